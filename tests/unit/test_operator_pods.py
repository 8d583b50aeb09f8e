"""Pods as Kubernetes writes them: templates are merged over what the operator writes, in every role."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_fakes import SETTINGS, Json, job
from test_operator_children import container, example, pod_templates

from distill_api.job import InvalidManifest
from distill_api.pods import former_template
from distill_api.pods.refusals import CONTAINER_FIELDS, POD_FIELDS
from distill_api.teacher.kind import parse_teacher
from distill_operator.resources import teacher_servers
from distill_operator.resources.strategic_merge import APPENDED, KEYS, merged

ROLES = ("teacher", "head", "engine", "trainer", "shared teacher")
MAINS = {"head": "ray-head", "shared teacher": "teacher"}
FIELDS = {"teacher": "teacher", "head": "rollout", "engine": "rollout", "trainer": "trainer"}


def shared_teacher(template: Json) -> Json:
    body = {
        "apiVersion": "distillation-operator.io/v1alpha1",
        "kind": "Teacher",
        "metadata": {"name": "poet", "namespace": "default", "uid": "5f0c0a54-0000-4000-8000-000000000002"},
        "spec": {"model": "/models/teacher", "accelerator": "none", "template": template},
    }
    made: Json = teacher_servers.deployment(parse_teacher(body), SETTINGS, 1)
    return made


def rendered(role: str, template: Json, **spec: Any) -> Json:
    """The pods of a role whose own template is this one."""
    if role == "shared teacher":
        found: Json = shared_teacher(template)["spec"]["template"]
        return found
    part = FIELDS[role]
    model = {"model": "/models/teacher"} if part == "teacher" else {}
    name = "headTemplate" if role == "head" else "template"
    return pod_templates(job(**{part: {**model, name: template}}, **spec))[role]


def main(**fields: Any) -> Json:
    return {"spec": {"containers": [{"name": "main", **fields}]}}


in_every_role = pytest.mark.parametrize("role", ROLES)


# The merge


NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.sampled_from([0, 1, "x", True])
PLAIN = st.dictionaries(st.sampled_from(["p", "q", "valueFrom"]), SCALARS, max_size=2)


def entries(key: str) -> st.SearchStrategy[Json]:
    return st.builds(lambda name, rest: {**rest, key: name}, NAMES, PLAIN)


def objects() -> st.SearchStrategy[Json]:
    lists = {field: st.lists(entries(keys[0]), max_size=3) for field, keys in KEYS.items()}
    lists |= {field: st.lists(PLAIN, max_size=3) for field in APPENDED}
    lists |= {"args": st.lists(SCALARS, max_size=2), "scalar": SCALARS, "valueFrom": PLAIN}
    level = st.fixed_dictionaries({}, optional=lists)
    return st.builds(lambda outer, inner: {**outer, "spec": inner}, level, level)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(base=objects(), patch=objects())
def test_a_patch_that_is_merged_twice_says_what_it_said_once(base: Json, patch: Json) -> None:
    base = merged({}, base)  # each name once, as the API server has it
    before = copy.deepcopy((base, patch))
    once = merged(base, patch)
    assert merged(once, patch) == once
    assert (base, patch) == before, "neither is changed"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(base=objects())
def test_an_empty_patch_changes_nothing(base: Json) -> None:
    base = merged({}, base)
    assert merged(base, {}) == base
    assert merged(base, {"spec": {}, "containers": [], "tolerations": []}) == {
        "containers": [],
        "tolerations": [],
        **base,
    }


def test_named_things_are_merged_in_their_place_and_new_ones_come_last() -> None:
    base = {"containers": [{"name": "a", "image": "i", "tty": True}, {"name": "b"}]}
    made = merged(base, {"containers": [{"name": "c"}, {"name": "a", "image": "j"}]})
    assert made == {"containers": [{"name": "a", "image": "j", "tty": True}, {"name": "b"}, {"name": "c"}]}


def test_a_variable_or_a_volume_has_one_source_that_of_the_patch() -> None:
    base = {"env": [{"name": "A", "value": "1"}], "volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}]}
    source = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    made = merged(base, {"env": [{"name": "A", **source}], "volumes": [{"name": "v", "configMap": {"name": "c"}}]})
    assert made == {"env": [{"name": "A", **source}], "volumes": [{"name": "v", "configMap": {"name": "c"}}]}
    sized = merged(base, {"volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}]})
    assert sized["volumes"] == [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]


def test_null_leaves_out_what_was_there_and_is_never_written() -> None:
    base = {"securityContext": {"runAsUser": 1000, "fsGroup": 1000}}
    assert merged(base, {"securityContext": {"runAsUser": None}}) == {"securityContext": {"fsGroup": 1000}}
    assert merged({}, {"a": {"b": None}}) == {"a": {}}


# What it is for, in every role


@in_every_role
def test_an_init_container_a_sidecar_and_their_volume_come_beside_the_main_container(role: str) -> None:
    init = {
        "name": "fetch",
        "image": "tools:1",
        "command": ["fetch"],
        "volumeMounts": [{"name": "w", "mountPath": "/w"}],
    }
    sidecar = {"name": "log", "image": "log:1", "restartPolicy": "Always"}
    made = rendered(role, {"spec": {"initContainers": [init, sidecar], "volumes": [{"name": "w", "emptyDir": {}}]}})
    assert made["spec"]["initContainers"] == [init, sidecar]
    assert {"name": "w", "emptyDir": {}} in made["spec"]["volumes"]
    assert [c["name"] for c in made["spec"]["containers"]] == [MAINS.get(role, role)]


@pytest.mark.parametrize("role", [r for r in ROLES if r != "trainer"])
def test_a_container_more_comes_after_the_main_one(role: str) -> None:
    """KubeRay takes the first for Ray's, and the operator the first for the role's."""
    made = rendered(role, {"spec": {"containers": [{"name": "dcgm", "image": "dcgm:1"}]}})
    assert [c["name"] for c in made["spec"]["containers"]] == [MAINS.get(role, role), "dcgm"]


@in_every_role
def test_a_capability_for_rdma_is_added_and_everything_else_stays_dropped(role: str) -> None:
    made = rendered(
        role,
        main(
            securityContext={"capabilities": {"add": ["IPC_LOCK"]}},
            resources={"limits": {"rdma/hca": 1, "hugepages-2Mi": "1Gi"}},
        ),
    )
    own = container(made)
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
    }
    assert own["resources"]["limits"]["rdma/hca"] == "1" and own["resources"]["limits"]["hugepages-2Mi"] == "1Gi"
    assert own["resources"]["requests"] == {"cpu": "100m", "memory": "1Gi"}


@in_every_role
def test_a_pod_in_the_network_of_its_node_still_finds_the_cluster_by_name(role: str) -> None:
    assert rendered(role, {"spec": {"hostNetwork": True}})["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    own = {"hostNetwork": True, "dnsPolicy": "None", "dnsConfig": {"nameservers": ["10.0.0.10"]}}
    assert own.items() <= rendered(role, {"spec": own})["spec"].items()
    assert "dnsPolicy" not in rendered(role, {})["spec"]


@in_every_role
def test_fields_of_a_pod_that_the_operator_does_not_know_are_passed_on(role: str) -> None:
    spec = {
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h200"}],
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
        "terminationGracePeriodSeconds": 600,
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["hub"]}],
        "priorityClassName": "high",
        "schedulerName": "mine",
        "runtimeClassName": "nvidia",
        "serviceAccountName": "trainer",
        "imagePullSecrets": [{"name": "registry"}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "gpu"},
        "affinity": {"nodeAffinity": {}},
    }
    made = rendered(role, {"spec": {**spec, **main(resources={"claims": [{"name": "gpu"}]})["spec"]}})
    assert spec.items() <= made["spec"].items()
    assert container(made)["resources"]["claims"] == [{"name": "gpu"}]


@pytest.mark.parametrize("role", ["trainer", "teacher"])
def test_a_container_that_is_deleted_as_it_starts_has_time_to_set_its_handler_of_the_signal(role: str) -> None:
    """As the first process of its container it would never receive a SIGTERM that came before."""
    made = rendered(role, {})
    assert container(made)["lifecycle"] == {"preStop": {"exec": {"command": ["sleep", "2"]}}}
    assert made["spec"]["terminationGracePeriodSeconds"] >= 30, "the delay counts towards the grace period"


@in_every_role
def test_a_hook_of_the_user_before_the_signal_replaces_that_of_the_operator(role: str) -> None:
    own = {"preStop": {"httpGet": {"path": "/drain", "port": 8080}}}
    assert container(rendered(role, main(lifecycle=own)))["lifecycle"] == own
    assert "lifecycle" not in container(rendered(role, main(lifecycle=None)))


@pytest.mark.parametrize("role", FIELDS)
def test_a_hook_of_the_user_for_all_roles_replaces_that_of_the_operator(role: str) -> None:
    own = {"preStop": {"httpGet": {"path": "/drain", "port": 8080}}}
    assert container(rendered(role, {}, podTemplate=main(lifecycle=own)))["lifecycle"] == own


@pytest.mark.parametrize("role", ["trainer", "teacher"])
def test_a_hook_of_the_user_after_the_start_is_beside_that_of_the_operator(role: str) -> None:
    own = {"postStart": {"exec": {"command": ["true"]}}}
    assert set(container(rendered(role, main(lifecycle=own)))["lifecycle"]) == {"postStart", "preStop"}


def test_each_role_may_have_an_accelerator_of_its_own() -> None:
    made = pod_templates(
        job(
            accelerator="nvidia.com/gpu",
            teacher={"model": "/models/teacher", "accelerator": "amd.com/gpu", "tensorParallelSize": 4},
            rollout={"accelerator": "nvidia.com/mig-3g.40gb"},
            trainer={"gpusPerNode": 2},
        )
    )
    limits = {role: container(template)["resources"].get("limits", {}) for role, template in made.items()}
    assert limits == {
        "teacher": {"amd.com/gpu": "4"},
        "head": {},
        "engine": {"nvidia.com/mig-3g.40gb": "1"},
        "trainer": {"nvidia.com/gpu": "2"},
    }


def test_the_trainer_may_have_another_accelerator_than_the_engines_by_weights_on_disk() -> None:
    made = pod_templates(
        job(accelerator="nvidia.com/gpu", trainer={"accelerator": "amd.com/gpu", "weightSync": "disk"})
    )
    assert container(made["trainer"])["resources"]["limits"] == {"amd.com/gpu": "1"}
    assert container(made["engine"])["resources"]["limits"] == {"nvidia.com/gpu": "1"}


@in_every_role
def test_the_environment_may_come_from_elsewhere(role: str) -> None:
    made = container(rendered(role, main(envFrom=[{"secretRef": {"name": "hub"}}])))
    assert made["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert any(e["name"] == "DISTILL_JOB_FILE" for e in made["env"])


@in_every_role
def test_user_and_group_may_be_left_to_the_platform(role: str) -> None:
    """As OpenShift wants it: null leaves out what the operator writes."""
    given = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    made = rendered(role, {"spec": {"securityContext": given}})["spec"]["securityContext"]
    assert not given.keys() & made.keys() and made["runAsNonRoot"] is True


@pytest.mark.parametrize("role", FIELDS)
def test_a_role_may_leave_out_what_the_template_of_all_roles_asks_for(role: str) -> None:
    for_all = main(resources={"limits": {"rdma/hca": 1, "memory": "9Gi"}})
    made = container(rendered(role, main(resources={"limits": {"rdma/hca": None}}), podTemplate=for_all))
    assert made["resources"] == {"requests": {"cpu": "100m"}, "limits": {"memory": "9Gi"}}
    without = container(rendered(role, main(resources=None), podTemplate=for_all))
    assert "resources" not in without


@in_every_role
def test_a_template_cannot_take_a_pod_out_of_its_services(role: str) -> None:
    made = rendered(role, {"metadata": {"labels": {"team": "a"}, "annotations": {"prometheus.io/scrape": "false"}}})
    assert made["metadata"]["labels"]["team"] == "a"
    assert made["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "distillation-operator"
    assert made["metadata"]["annotations"]["prometheus.io/scrape"] == "false"
    with pytest.raises(InvalidManifest, match="may not have keys under distillation-operator"):
        rendered(role, {"metadata": {"labels": {"distillation-operator.io/job": "other"}}})


@in_every_role
def test_an_empty_template_changes_nothing(role: str) -> None:
    empty = {"metadata": {"labels": {}, "annotations": {}}, "spec": {"containers": [{"name": "main"}]}}
    assert rendered(role, empty) == rendered(role, {})


def test_a_probe_of_the_operators_may_be_given_more_time() -> None:
    made = container(rendered("teacher", main(startupProbe={"failureThreshold": 9000})))
    assert made["startupProbe"]["failureThreshold"] == 9000 and made["startupProbe"]["httpGet"]["path"] == "/model_info"


# One template for all roles


MODELS = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}


def test_one_template_is_for_all_roles_and_a_roles_own_goes_before_it() -> None:
    for_all = {
        "metadata": {"labels": {"team": "a"}},
        "spec": {
            "volumes": [MODELS],
            "tolerations": [{"key": "gpu"}],
            "nodeSelector": {"pool": "gpu"},
            "containers": [{"name": "main", "image": "all:1", "volumeMounts": [{"name": "models", "mountPath": "/m"}]}],
        },
    }
    own = {
        "metadata": {"labels": {"team": "b"}},
        "spec": {"containers": [{"name": "trainer", "image": "own:1"}], "tolerations": [{"key": "big"}]},
    }
    made = pod_templates(job(podTemplate=for_all, trainer={"template": own}))
    assert set(made) == {"teacher", "head", "engine", "trainer"}
    for role, template in made.items():
        assert MODELS in template["spec"]["volumes"] and template["spec"]["nodeSelector"] == {"pool": "gpu"}
        assert {"name": "models", "mountPath": "/m"} in container(template)["volumeMounts"]
        assert container(template)["image"] == ("own:1" if role == "trainer" else "all:1")
        assert template["metadata"]["labels"]["team"] == ("b" if role == "trainer" else "a")
    assert made["trainer"]["spec"]["tolerations"] == [{"key": "gpu"}, {"key": "big"}]
    assert made["engine"]["spec"]["tolerations"] == [{"key": "gpu"}]


def test_a_variable_of_nccl_for_all_roles_is_that_of_both_ends() -> None:
    for_all = main(env=[{"name": "NCCL_CUMEM_ENABLE", "value": "1"}])
    made = pod_templates(job(accelerator="nvidia.com/gpu", podTemplate=for_all))
    found = [[e["value"] for e in container(t)["env"] if e["name"] == "NCCL_CUMEM_ENABLE"] for t in made.values()]
    assert found == [["1"]] * 4


def test_by_infiniband_the_roles_that_exchange_weights_have_its_adapters_and_may_pin_memory() -> None:
    made = {role: container(t) for role, t in pod_templates(example("qwen3-8b-infiniband")).items()}
    capabilities = {role: c["securityContext"]["capabilities"] for role, c in made.items()}
    assert set(map(str, capabilities.values())) == {str({"drop": ["ALL"], "add": ["IPC_LOCK"]})}
    adapters = {role for role, c in made.items() if "rdma/hca" in c["resources"].get("limits", {})}
    assert adapters == {"trainer", "engine"}


def test_by_ethernet_every_pod_is_as_restricted_as_without_a_template() -> None:
    plain = {role: t["spec"] for role, t in pod_templates(job(accelerator="nvidia.com/gpu")).items()}
    for role, template in pod_templates(example("qwen3-8b-ethernet")).items():
        for of, other in ((template["spec"], plain[role]), (container(template), plain[role]["containers"][0])):
            assert of["securityContext"] == other["securityContext"]


# What may not be said


def refusal(role: str, template: Json) -> str:
    with pytest.raises(InvalidManifest) as caught:
        rendered(role, template)
    [problem] = caught.value.problems
    return problem


@in_every_role
@pytest.mark.parametrize("field", POD_FIELDS)
def test_a_field_of_pods_that_the_operator_alone_sets_is_refused_by_name(role: str, field: str) -> None:
    assert f"{field} may not be set: " in refusal(role, {"spec": {field: "x"}})


@in_every_role
@pytest.mark.parametrize("field", CONTAINER_FIELDS)
def test_a_field_of_the_main_container_that_the_operator_alone_sets_is_refused_by_name(role: str, field: str) -> None:
    assert f"containers[main].{field} may not be set: " in refusal(role, main(**{field: ["x"]}))
    name = MAINS.get(role, role)
    assert f"containers[{name}].{field} may" in refusal(role, {"spec": {"containers": [{"name": name, field: ["x"]}]}})


@in_every_role
@pytest.mark.parametrize("name", ["DISTILL_JOB_FILE", "DISTILL_TEACHER_KEY_X", "RAY_AUTH_TOKEN", "POD_IP"])
def test_a_variable_between_operator_and_workers_is_refused_by_name(role: str, name: str) -> None:
    assert f"env[{name}] may not be set" in refusal(role, main(env=[{"name": name, "value": "x"}]))


@in_every_role
def test_the_operators_own_volumes_and_the_jobs_file_are_refused_by_name(role: str) -> None:
    assert "volumes[job] may not be set" in refusal(role, {"spec": {"volumes": [{"name": "job", "emptyDir": {}}]}})
    assert "set spec.output.volume" in refusal(role, {"spec": {"volumes": [{"name": "output", "emptyDir": {}}]}})
    place = {"name": "publish-0", "emptyDir": {}}
    assert "volumes[publish-0] may not be set: it is the Secret of" in refusal(role, {"spec": {"volumes": [place]}})
    mount = {"name": "x", "mountPath": "/etc/distill"}
    assert "volumeMounts[/etc/distill] may not be set" in refusal(role, main(volumeMounts=[mount]))


@in_every_role
def test_a_container_that_is_given_twice_or_by_the_name_of_another_role_is_refused(role: str) -> None:
    name = MAINS.get(role, role)
    twice = {"spec": {"containers": [{"name": "main"}, {"name": name}]}}
    assert f"containers main and {name} are the same one" in refusal(role, twice)
    other = "engine" if role == "trainer" else "trainer"
    said = refusal(role, {"spec": {"containers": [{"name": other}]}})
    assert f"containers[{other}] must be main or {name}" in said
    assert "has the name of a main container" in refusal(role, {"spec": {"initContainers": [{"name": "main"}]}})


@pytest.mark.parametrize("spec", [{"podTemplate": "dcgm"}, {"trainer": "dcgm"}], ids=["all roles", "trainer"])
def test_a_container_that_would_keep_the_trainers_job_from_ending_is_refused(spec: dict[str, str]) -> None:
    [(part, name)] = spec.items()
    template = {"spec": {"containers": [{"name": name, "image": "i"}]}}
    with pytest.raises(InvalidManifest, match=r"containers\[dcgm\] may not be set: .* put it in initContainers"):
        job(**{part: {"template": template} if part == "trainer" else template})


def test_the_template_of_all_roles_calls_no_container_by_the_name_that_it_has_in_one() -> None:
    with pytest.raises(InvalidManifest, match=r"podTemplate.spec: containers\[trainer\] must be main"):
        job(podTemplate={"spec": {"containers": [{"name": "trainer"}]}})


@pytest.mark.parametrize(
    ("of_engine", "sentence"),
    [
        ({"value": "0"}, "NCCL_CUMEM_ENABLE is 1 in trainer.template and 0 in rollout.template"),
        ({"valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}, "must have a value in the template itself"),
    ],
)
def test_the_ends_of_a_nccl_group_that_would_disagree_are_refused(of_engine: Json, sentence: str) -> None:
    one = main(env=[{"name": "NCCL_CUMEM_ENABLE", "value": "1"}])
    other = main(env=[{"name": "NCCL_CUMEM_ENABLE", **of_engine}])
    with pytest.raises(InvalidManifest, match=sentence):
        job(accelerator="nvidia.com/gpu", trainer={"template": one}, rollout={"template": other})


def test_nothing_is_mounted_over_the_output() -> None:
    mount = {"name": "x", "mountPath": "/output"}
    with pytest.raises(InvalidManifest, match=r"volumeMounts\[/output\] may not be set for the trainer"):
        job(podTemplate=main(volumeMounts=[mount]))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"containers": "x"}, "containers must be a list of mappings"),
        ({"containers": None}, "containers must be a list of mappings"),
        ({"containers": [{"image": "x"}]}, r"containers\[0\].name must be a string"),
        ({"volumes": ["scratch"]}, "volumes must be a list of mappings"),
        ({"affinity": "x"}, "affinity must be a mapping"),
        ({"containers": [{"name": "main", "env": {"A": "b"}}]}, r"containers\[main\].env must be a list of mappings"),
        ({"containers": [{"name": "main", "resources": {"limits": {"memory": "16 GB"}}}]}, "must be a quantity"),
        ({"containers": [{"name": "main", "resources": {"limits": ["x"]}}]}, "resources.limits must be a mapping"),
        ({"containers": [{"name": "main", "lifecycle": "abc"}]}, r"containers\[main\].lifecycle must be a mapping"),
        ({"containers": [{"name": "main", "lifecycle": ["x"]}]}, r"containers\[main\].lifecycle must be a mapping"),
        ({"initContainers": [{"name": "a", "resources": "x"}]}, r"initContainers\[a\].resources must be a mapping"),
    ],
)
def test_what_has_another_shape_than_a_pod_is_refused_before_anything_reads_it(spec: Json, sentence: str) -> None:
    with pytest.raises(InvalidManifest, match=sentence):
        job(trainer={"template": {"spec": spec}})


# Release 0.2.0


FORMER = {
    "image": "mine:1",
    "imagePullPolicy": "Always",
    "imagePullSecrets": ["registry"],
    "resources": {"requests": {"cpu": 2}, "limits": {"memory": "8Gi"}},
    "env": [{"name": "A", "value": "1"}],
    "volumes": [{"name": "w", "emptyDir": {}}],
    "volumeMounts": [{"name": "w", "mountPath": "/w"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu"}],
    "affinity": {"nodeAffinity": {}},
    "labels": {"team": "a"},
    "annotations": {"note": "n"},
    "serviceAccountName": "trainer",
    "priorityClassName": "high",
    "schedulerName": "mine",
    "runtimeClassName": "nvidia",
}
STORED: Json = {
    **{key: [] for key in former_template.LISTS},
    **{key: {} for key in former_template.MAPS},
    "imagePullPolicy": "IfNotPresent",
    "resources": {"requests": {}, "limits": {}},
}
"""What the API server stored of an empty template of release 0.2.0."""


@in_every_role
def test_a_template_of_release_0_2_0_makes_the_same_pods_as_what_it_is_migrated_to(role: str) -> None:
    assert FORMER.keys() == set(former_template.FIELDS)
    assert rendered(role, FORMER) == rendered(role, former_template.as_pod(FORMER))
    assert rendered(role, {**STORED, **FORMER}) == rendered(role, FORMER)


@in_every_role
def test_the_defaults_that_release_0_2_0_stored_change_nothing(role: str) -> None:
    assert rendered(role, STORED) == rendered(role, {})
