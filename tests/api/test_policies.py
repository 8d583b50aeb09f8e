"""The chart's admission policies on a real API server: what they hold users and the operator's ServiceAccount to."""

import copy
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT, ApiServer, _binary
from operator_world import JOBS, Json, Kubelet, World, manifest, teacher
from test_operator_rights import whole_life

pytest_plugins = ["operator_fixtures"]

CHART = ROOT / "charts" / "distillation-operator"
OPERATOR = "system:serviceaccount:default:everywhere"
ALLOWED = (
    "workersImage=registry.example/workers:1",
    "policies.users.images={registry.example/team/*}",
    "policies.users.serviceAccounts={trainer}",
    "policies.users.priorityClasses={low-*}",
    "policies.users.secrets={hub-token}",
    "policies.users.keyEndpoints={https://scorer.example}",
    "policies.users.capabilities={IPC_LOCK}",
)
EVERYWHERE = "serviceAccount.create=false,serviceAccount.name=everywhere"
"""The ServiceAccount that the operator of these tests runs as."""


def policies(file: str, *values: str) -> str:
    """The manifests of one template of the chart, for a release in the namespace default."""
    sets = [part for value in values for part in ("--set", value)]
    command = [_binary("helm"), "template", "release", CHART, "--namespace=default", "-s", f"templates/{file}", *sets]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def installed(server: ApiServer, manifests: str, refused: tuple[str, ...], probe: Json) -> Iterator[None]:
    """Policies while a test runs. They take effect about a second after they are created."""
    server.kubectl("apply", "-f", "-", stdin=manifests)
    try:
        deadline = time.monotonic() + 30
        while "denied" not in server.kubectl(*refused, stdin=json.dumps(probe), check=False).stderr:
            assert time.monotonic() < deadline, "the policy has no effect"
            time.sleep(0.3)
        yield
    finally:
        server.kubectl("delete", "-f", "-", stdin=manifests)


# Users


@pytest.fixture(scope="module")
def users(crds_installed: ApiServer) -> Iterator[None]:
    """The policy on users, and ada, who may create jobs and read the Secret `mine` in namespaces that are bound."""
    rules: list[Json] = [
        {"apiGroups": ["distillation-operator.io"], "resources": ["distillationjobs", "teachers"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["mine"], "verbs": ["get"]},
    ]
    meta = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "ada"}}
    crds_installed.kubectl("apply", "-f", "-", stdin=json.dumps({**meta, "rules": rules}))
    crds_installed.kubectl("create", "clusterrolebinding", "ada", "--clusterrole=ada", "--user=ada")
    crds_installed.kubectl("create", "namespace", "probe")
    crds_installed.kubectl("label", "namespace", "probe", "bound=yes")
    values = ("policies.users.enabled=true", "policies.users.namespaceSelector.matchLabels.bound=yes", *ALLOWED)
    probe = ("create", "-n", "probe", "--as=ada", "--dry-run=server", "-f", "-")
    bad = job(trainer={"template": {"image": "evil"}})
    yield from installed(crds_installed, policies("policy-users.yaml", *values), probe, bad)
    crds_installed.kubectl("delete", "clusterrolebinding/ada", "clusterrole/ada", "namespace/probe", "--wait=false")


@pytest.fixture
def bound(crds_installed: ApiServer, users: None, namespace: str) -> str:
    crds_installed.kubectl("label", "namespace", namespace, "bound=yes")
    return namespace


def job(**spec: Any) -> Json:
    made = copy.deepcopy(manifest("job"))
    for key, value in spec.items():
        made["spec"][key] = {**made["spec"].get(key, {}), **value} if isinstance(value, dict) else value
    return made


def created_by_ada(server: ApiServer, namespace: str, body: Json) -> str:
    """What the API server says against it; nothing when it takes it."""
    done = server.kubectl(
        *("create", "-n", namespace, "--as=ada", "--dry-run=server", "-f", "-"), stdin=json.dumps(body), check=False
    )
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


def environment(secret: str) -> Json:
    return {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": secret, "key": "k"}}}]}


def volume(**kind: Any) -> Json:
    return {"volumes": [{"name": "v", **kind}]}


def pods(**spec: Any) -> Json:
    """The template of all roles."""
    return job(podTemplate={"spec": spec})


def main(**fields: Any) -> Json:
    return pods(containers=[{"name": "main", **fields}])


def fetching(**fields: Any) -> Json:
    return pods(initContainers=[{"name": "fetch", **fields}])


KEY = {"name": "hub-token", "key": "k"}
TAKEN: dict[str, Json] = {
    "pods of listed things": pods(
        containers=[
            {
                "name": "main",
                "image": "registry.example/team/sglang:2",
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "envFrom": [{"secretRef": {"name": "hub-token"}}],
            }
        ],
        initContainers=[{"name": "fetch", "image": "registry.example/team/fetch:1", **environment("mine")}],
        volumes=[{"name": "v", "emptyDir": {}}],
        imagePullSecrets=[{"name": "mine"}],
        serviceAccountName="trainer",
        priorityClassName="low-batch",
    ),
    "nothing of its own": job(),
    "the workers' image": job(trainer={"template": {"image": "registry.example/workers:1"}}),
    "an image by its beginning": job(teacher={"template": {"image": "registry.example/team/sglang:2"}}),
    "an account": job(rollout={"template": {"serviceAccountName": "trainer"}}),
    "a priority": job(scheduling={"priorityClassName": "low-batch"}),
    "a listed secret": job(trainer={"template": environment("hub-token")}),
    "a listed secret of a place": job(output={"publish": [{"to": "hf://a/b", "secret": "hub-token"}]}),
    "a secret that the user may read": job(trainer={"template": environment("mine")}),
    "usual volumes": job(
        trainer={
            "template": {
                "volumes": [
                    {"name": "a", "persistentVolumeClaim": {"claimName": "c"}},
                    {"name": "b", "emptyDir": {}},
                    {
                        "name": "c",
                        "projected": {"sources": [{"secret": {"name": "mine"}}, {"configMap": {"name": "m"}}]},
                    },
                ]
            }
        }
    ),
    "a key for a listed endpoint": job(
        teacher={"model": None, "endpoint": {"url": "https://scorer.example", "keySecret": KEY}}
    ),
    "a Teacher": teacher("poet"),
}
TOKEN = {"sources": [{"serviceAccountToken": {"path": "token"}}]}
POET = teacher("poet")
REFUSED: dict[str, tuple[Json, str]] = {
    "image of the trainer": (job(trainer={"template": {"image": "evil"}}), "image of a template"),
    "image of the teacher": (job(teacher={"template": {"image": "registry.example/other"}}), "image of a template"),
    "image of the head": (job(rollout={"headTemplate": {"image": "evil"}}), "image of a template"),
    "image of one of several": (
        job(
            teacher=None,
            teachers=[{"name": "a", "model": "/m", "template": {"image": "evil"}}],
            data={"prompts": {"path": "/data/train.jsonl"}, "defaultTeacher": "a"},
        ),
        "image of a template",
    ),
    "image of pods": (main(image="evil"), "image of a template"),
    "image of a role's pods": (
        job(trainer={"template": {"spec": {"containers": [{"name": "main", "image": "evil"}]}}}),
        "image of a template",
    ),
    "image of an init container": (fetching(image="evil"), "image of a template"),
    "account of pods": (pods(serviceAccountName="admin"), "serviceAccountName of a template"),
    "priority of pods": (pods(priorityClassName="high"), "priorityClassName must"),
    "path of the node in pods": (pods(**volume(hostPath={"path": "/"})), "volumes of a template"),
    "token of an account in pods": (pods(**volume(projected=TOKEN)), "volumes of a template"),
    "secret in a volume of pods": (pods(**volume(secret={"secretName": "theirs"})), "Secret that the job"),
    "secret to pull with in pods": (pods(imagePullSecrets=[{"name": "theirs"}]), "Secret that the job names"),
    "secret in the environment of pods": (main(**environment("theirs")), "Secret that the job names"),
    "secret as the environment of an init container": (
        fetching(envFrom=[{"secretRef": {"name": "theirs"}}]),
        "Secret that the job names",
    ),
    "network of the node": (pods(hostNetwork=True), "network, ports or processes of its node"),
    "processes of the node": (pods(hostPID=True), "network, ports or processes of its node"),
    "port of the node": (fetching(ports=[{"containerPort": 1, "hostPort": 1}]), "network, ports or processes"),
    "a privileged container": (main(securityContext={"privileged": True}), "nor be privileged"),
    "a capability": (main(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "capabilities that a template"),
    "image of a Teacher's pods": (
        {**POET, "spec": {**POET["spec"], "template": {"spec": {"containers": [{"name": "main", "image": "evil"}]}}}},
        "image of a template",
    ),
    "image of a Teacher": ({**POET, "spec": {**POET["spec"], "template": {"image": "evil"}}}, "image of a template"),
    "account": (job(trainer={"template": {"serviceAccountName": "admin"}}), "serviceAccountName of a template"),
    "priority of the job": (job(scheduling={"priorityClassName": "system-node-critical"}), "priorityClassName must"),
    "priority of a role": (job(trainer={"template": {"priorityClassName": "high"}}), "priorityClassName must"),
    "path of the node": (job(trainer={"template": volume(hostPath={"path": "/"})}), "volumes of a template"),
    "token of an account": (job(trainer={"template": volume(projected=TOKEN)}), "volumes of a template"),
    "secret in the environment": (job(trainer={"template": environment("theirs")}), "Secret that the job names"),
    "secret in a volume": (job(trainer={"template": volume(secret={"secretName": "theirs"})}), "Secret that the job"),
    "secret in a projected volume": (
        job(trainer={"template": volume(projected={"sources": [{"secret": {"name": "theirs"}}]})}),
        "Secret that the job names",
    ),
    "secret to pull with": (job(rollout={"template": {"imagePullSecrets": ["theirs"]}}), "Secret that the job names"),
    "secret of a tracker": (
        job(tracking={"wandb": {"project": "p", "keySecret": "theirs"}}),
        "Secret that the job names",
    ),
    "secret of a place": (
        job(output={"publish": [{"to": "hf://a/b"}, {"to": "hf://a/c", "secret": "theirs"}]}),
        "Secret that the job names",
    ),
    "secret of an endpoint": (
        job(
            teacher={
                "model": None,
                "endpoint": {"url": "https://scorer.example", "keySecret": {**KEY, "name": "theirs"}},
            }
        ),
        "Secret that the job names",
    ),
    "key for another endpoint": (
        job(teacher={"model": None, "endpoint": {"url": "https://evil.example", "keySecret": KEY}}),
        "to which the key is sent",
    ),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_user_may_create_what_the_lists_allow(what: str, crds_installed: ApiServer, bound: str) -> None:
    assert created_by_ada(crds_installed, bound, TAKEN[what]) == ""


@pytest.mark.parametrize("what", REFUSED)
def test_a_user_is_refused_what_the_lists_do_not_name(what: str, crds_installed: ApiServer, bound: str) -> None:
    body, sentence = REFUSED[what]
    said = created_by_ada(crds_installed, bound, body)
    assert "default.release-distillation-operator-users" in said and sentence in said


def test_a_template_that_changes_is_looked_at_again_and_nothing_else_that_does(
    crds_installed: ApiServer, bound: str
) -> None:
    """The API server's rule that a template is immutable does not see a key that takes another's place."""
    crds_installed.kubectl("create", "-n", bound, "-f", "-", stdin=json.dumps(pods(dnsPolicy="Default")))

    def said(spec: Json) -> str:
        patch = json.dumps({"spec": spec})
        return crds_installed.kubectl(
            *("patch", "djob", "job", "-n", bound, "--type=merge", "-p", patch), check=False
        ).stderr

    assert "network, ports or processes of its node" in said(
        {"podTemplate": {"spec": {"dnsPolicy": None, "hostNetwork": True}}}
    )
    assert said({"suspend": True}) == ""


def test_other_namespaces_are_not_bound(crds_installed: ApiServer, users: None, namespace: str) -> None:
    assert created_by_ada(crds_installed, namespace, REFUSED["image of the trainer"][0]) == ""


# The operator


@pytest.fixture
def held(crds_installed: ApiServer, operator_kubeconfig: Any, namespace: str) -> Iterator[None]:
    probe = ("create", "-n", namespace, f"--as={OPERATOR}", "--dry-run=server", "-f", "-")
    yield from installed(crds_installed, policies("policy-operator.yaml", EVERYWHERE), probe, config_map())


def config_map(owner: Json | None = None, labelled: bool = False) -> Json:
    made: Json = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    if owner is not None:
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "controller": True}
        made["metadata"]["ownerReferences"] = [reference]
    if labelled:
        made["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "distillation-operator"}
    return made


@pytest.mark.usefixtures("kuberay", "held")
def test_a_job_and_a_teacher_live_their_whole_lives_under_the_operators_policy(world: World, kubelet: Kubelet) -> None:
    operator = world.operator()
    whole_life(world, kubelet)
    events = world.api.items(world.path("/apis/events.k8s.io/v1/namespaces/{ns}/events"))
    assert {event["regarding"]["name"] for event in events} >= {"job", "poet"}
    assert operator.terminate()[0] == 0
    assert "ValidatingAdmissionPolicy" not in operator.log()


@pytest.mark.usefixtures("held")
def test_the_operator_may_not_make_take_or_delete_what_is_not_its_own(world: World, crds_installed: ApiServer) -> None:
    owner = world.api.call("POST", world.path(JOBS), manifest("job"))
    foreign = {**owner, "apiVersion": "apps/v1", "kind": "Deployment"}

    def said(body: Json, *arguments: str) -> str:
        command = (*arguments, "-n", world.namespace, f"--as={OPERATOR}", "-f", "-")
        return crds_installed.kubectl(*command, stdin=json.dumps(body), check=False).stderr

    create = ("create", "--dry-run=server")
    assert said(config_map(owner, labelled=True), *create) == ""
    assert "only what a DistillationJob or a Teacher owns" in said(config_map(labelled=True), *create)
    assert "only what a DistillationJob or a Teacher owns" in said(config_map(foreign, labelled=True), *create)
    assert "only objects with the label" in said(config_map(owner), *create)
    job_of_others = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "theirs"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
    }
    crds_installed.kubectl("create", "-n", world.namespace, "-f", "-", stdin=json.dumps(job_of_others))
    metadata = {**config_map(owner, labelled=True)["metadata"], "name": "theirs"}
    taken = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
    assert "only what a DistillationJob or a Teacher owns" in said(taken, "apply", "--server-side", "--dry-run=server")
    assert "only what a DistillationJob or a Teacher owns" in said(job_of_others, "delete", "--wait=false")


@pytest.mark.usefixtures("held")
def test_the_operator_may_write_nothing_in_kube_system(world: World, crds_installed: ApiServer) -> None:
    owner = world.api.call("POST", world.path(JOBS), manifest("job"))
    done = crds_installed.kubectl(
        *("create", "-n", "kube-system", f"--as={OPERATOR}", "--dry-run=server", "-f", "-"),
        stdin=json.dumps(config_map(owner, labelled=True)),
        check=False,
    )
    assert "may write nothing in the namespaces kube-system" in done.stderr


@pytest.mark.usefixtures("held")
def test_the_policy_holds_nobody_but_the_operator(crds_installed: ApiServer, namespace: str) -> None:
    crds_installed.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(config_map()))


@pytest.mark.usefixtures("held")
def test_the_operator_may_take_a_lease_in_its_own_namespace_alone(crds_installed: ApiServer, namespace: str) -> None:
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "x"}}

    def said(where: str) -> str:
        command = ("create", "-n", where, f"--as={OPERATOR}", "--dry-run=server", "-f", "-")
        return crds_installed.kubectl(*command, stdin=json.dumps(lease), check=False).stderr

    assert said("default") == ""
    assert "only what a DistillationJob or a Teacher owns" in said(namespace)
