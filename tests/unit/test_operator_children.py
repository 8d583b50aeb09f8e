"""Children are pure functions of the job: golden files show each of them, and a few rules hold for all.

`UPDATE_GOLDEN=1 pytest tests/unit/test_operator_children.py` writes the files anew; read the difference.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_fakes import SETTINGS, Json, job

from distill_api import names
from distill_api.job import DistillationJob, load_job
from distill_api.protocol import read_teacher_addresses
from distill_operator.resources import rendering

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = ("qwen3-8b-opd", "arithmetic-cpu")


class Plain(yaml.SafeDumper):
    """Without anchors, for readers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def example(name: str) -> DistillationJob:
    found = load_job(ROOT / "examples" / f"{name}.yaml")
    metadata = found.metadata.model_copy(update={"uid": "5f0c0a54-0000-4000-8000-000000000001"})
    return found.model_copy(update={"metadata": metadata})


def children(of: DistillationJob) -> list[Json]:
    return [*rendering.lasting(of, SETTINGS), *rendering.serving(of, SETTINGS), rendering.training(of, SETTINGS, 1)]


def pod_templates(of: DistillationJob) -> dict[str, Json]:
    by_kind = {child["kind"]: child for child in children(of)}
    ray = by_kind["RayCluster"]["spec"]
    return {
        "teacher": by_kind["Deployment"]["spec"]["template"],
        "head": ray["headGroupSpec"]["template"],
        "engine": ray["workerGroupSpecs"][0]["template"],
        "trainer": by_kind["Job"]["spec"]["template"],
    }


def container(template: Json) -> Json:
    found: Json = template["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_children_are_as_in_the_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    made = yaml.dump_all(children(example(name)), Dumper=Plain, sort_keys=True, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(made)
    assert made == path.read_text(), "UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("role", ["teacher", "head", "engine", "trainer"])
def test_every_pod_is_restricted(name: str, role: str) -> None:
    spec = pod_templates(example(name))[role]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert {spec["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {1000}
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in spec["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"name": "tmp", "mountPath": "/tmp"} in each["volumeMounts"]
        assert {"name": "HOME", "value": "/tmp"} in each["env"]


def test_without_an_accelerator_nothing_asks_for_one() -> None:
    for template in pod_templates(job(accelerator="none")).values():
        assert set(container(template)["resources"]) == {"requests"}


def test_each_accelerated_container_gets_what_its_parallelism_needs() -> None:
    of = job(
        accelerator="amd.com/gpu",
        teacher={"model": "m", "tensorParallelSize": 4},
        rollout={"tensorParallelSize": 2},
        trainer={"gpusPerNode": 8},
    )
    counts = {
        role: container(template)["resources"].get("limits", {}).get("amd.com/gpu")
        for role, template in pod_templates(of).items()
    }
    assert counts == {"teacher": "4", "head": None, "engine": "2", "trainer": "8"}


def test_a_users_limit_takes_the_place_of_a_default_request() -> None:
    template = {"resources": {"limits": {"memory": "512Mi"}}}
    made = container(pod_templates(job(trainer={"template": template}))["trainer"])
    assert made["resources"] == {"requests": {"cpu": "100m"}, "limits": {"memory": "512Mi"}}


def test_a_template_overrides_what_it_names_and_nothing_twice() -> None:
    template = {
        "image": "mine:2",
        "imagePullPolicy": "Always",
        "env": [{"name": "HOME", "value": "/home"}, {"name": "MORE", "value": "1"}],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "9Gi"}}],
        "labels": {"team": "a"},
        "nodeSelector": {"pool": "gpu"},
    }
    made = pod_templates(job(trainer={"template": template}))["trainer"]
    main = container(made)
    assert (main["image"], main["imagePullPolicy"]) == ("mine:2", "Always")
    values = [(e["name"], e.get("value")) for e in main["env"]]
    assert values.count(("HOME", "/home")) == 1 and ("MORE", "1") in values
    assert len({name for name, _ in values}) == len(values)
    assert [v for v in made["spec"]["volumes"] if v["name"] == "tmp"] == template["volumes"]
    assert made["metadata"]["labels"]["team"] == "a"
    assert made["metadata"]["labels"]["distillation-operator.io/job"] == "job"
    assert made["spec"]["nodeSelector"] == {"pool": "gpu"}


def test_models_on_a_volume_need_no_hub() -> None:
    offline = {"name": "HF_HUB_OFFLINE", "value": "1"}
    assert offline in container(pod_templates(job())["teacher"])["env"]
    assert offline not in container(pod_templates(job(teacher={"model": "Qwen/Qwen3-32B"}))["teacher"])["env"]


@pytest.mark.parametrize(("sync", "mounted"), [("distributed", False), ("disk", True)])
def test_engines_mount_the_output_volume_only_to_read_weights_from_it(sync: str, mounted: bool) -> None:
    volumes = pod_templates(job(trainer={"weightSync": sync}))["engine"]["spec"]["volumes"]
    assert any(v["name"] == "output" for v in volumes) is mounted


def test_the_trainer_is_one_unit_whose_exit_codes_mean_something() -> None:
    made: Any = rendering.training(job(trainer={"nodes": 4}), SETTINGS, 7)
    spec = made["spec"]
    assert made["metadata"]["name"] == "job-trainer-7"
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimit"] == 0
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert ignore["action"] == "Ignore", "an evicted trainer ends with 75 as well, so this rule comes first"
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [75, 78])
    assert {"name": "MASTER_ADDR", "value": "job-trainer-7-0.job-trainer"} in container(spec["template"])["env"]


def test_the_secrets_of_the_places_are_folders_of_the_trainer_alone_each_once() -> None:
    places = [{"to": f"hf://a/{n}", "secret": secret} for n, secret in enumerate(["token", "other", "token"])]
    output = {"volume": {"claimName": "out"}, "publish": [*places, {"to": "file:///claim"}]}
    templates = {role: t["spec"] for role, t in pod_templates(job(output=output)).items()}
    found = {role: [v["secret"]["secretName"] for v in t["volumes"] if "secret" in v] for role, t in templates.items()}
    assert found == {"teacher": [], "head": [], "engine": [], "trainer": ["other", "token"]}
    assert all(v["secret"]["optional"] for v in templates["trainer"]["volumes"] if "secret" in v)
    mounts = {m["name"]: m for m in templates["trainer"]["containers"][0]["volumeMounts"]}
    assert mounts["publish-1"] == {"name": "publish-1", "mountPath": "/etc/distill-secrets/token", "readOnly": True}


def test_a_key_for_wandb_comes_from_its_secret_into_the_trainer_alone() -> None:
    templates = pod_templates(job(tracking={"wandb": {"project": "p", "keySecret": "wandb"}}))
    found = {role: [e for e in container(t)["env"] if e["name"] == "WANDB_API_KEY"] for role, t in templates.items()}
    [entry] = found.pop("trainer")
    assert entry["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "WANDB_API_KEY", "optional": True}
    assert not any(found.values())


def test_the_pods_read_the_spec_as_it_was_written() -> None:
    found = rendering.lasting(job(), SETTINGS)[0]
    manifest = yaml.safe_load(found["data"]["job.yaml"])
    assert manifest["metadata"]["name"] == "job"
    assert manifest["spec"]["schedule"] == {"steps": 10}, "defaults are not written into it"


def test_the_hash_of_a_child_follows_its_content() -> None:
    def hashes(of: DistillationJob) -> dict[str, str]:
        key = "distillation-operator.io/spec-hash"
        return {c["kind"] + c["metadata"]["name"]: c["metadata"]["annotations"][key] for c in children(of)}

    one, same, other = hashes(job()), hashes(job()), hashes(job(rollout={"replicas": 2}))
    assert one == same
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {"RayClusterjob-rollout", "ConfigMapjob-job"}


ENDPOINT = {
    "url": "https://vllm.example/v1",
    "protocol": "openai",
    "model": "big",
    "keySecret": {"name": "vllm", "key": "token"},
}
ROUTED = {"prompts": {"path": "/data/train.jsonl", "teacherField": "topic"}}


def several_teachers() -> DistillationJob:
    teachers = [
        {"name": "math", "model": "/models/math", "replicas": 3},
        {"name": "code", "model": "/models/code", "template": {"nodeSelector": {"gpu": "big"}}},
        {"name": "shared", "ref": {"name": "poet"}},
        {"name": "far", "endpoint": ENDPOINT},
    ]
    return job(teacher=None, teachers=teachers, data=ROUTED)


def environment_of_trainer(of: DistillationJob) -> dict[str, Any]:
    [trainer] = [c for c in children(of) if c["kind"] == "Job"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(trainer["spec"]["template"])["env"]}


@pytest.mark.parametrize("teacher", [{"endpoint": ENDPOINT}, {"ref": {"name": "poet"}}], ids=["endpoint", "ref"])
def test_nothing_is_made_for_a_teacher_that_is_somebody_elses(teacher: Json) -> None:
    made = {(c["kind"], c["metadata"]["name"]) for c in children(job(teacher=teacher))}
    assert made == {
        ("ConfigMap", "job-job"),
        ("NetworkPolicy", "job-traffic"),
        ("Service", "job-trainer"),
        ("RayCluster", "job-rollout"),
        ("Job", "job-trainer-1"),
    }


def test_the_key_of_an_endpoint_comes_from_its_secret_by_the_kubelet_into_the_trainer_alone() -> None:
    of = job(teacher={"endpoint": ENDPOINT})
    env = environment_of_trainer(of)
    assert env["DISTILL_TEACHER_KEY_TEACHER"] == {"secretKeyRef": {"name": "vllm", "key": "token"}}
    assert env["DISTILL_TEACHER_ADDRESS"] == "", "the workers read the URL in the job"
    others = [c for c in children(of) if c["kind"] != "Job"]
    assert "DISTILL_TEACHER_KEY_TEACHER" not in yaml.safe_dump_all(others)


def test_each_of_several_teachers_has_a_deployment_and_a_service_of_its_own() -> None:
    made = children(several_teachers())
    deployments = {c["metadata"]["name"]: c for c in made if c["kind"] == "Deployment"}
    services = {c["metadata"]["name"]: c for c in made if c["kind"] == "Service"}
    assert deployments.keys() == {"job-teacher-math", "job-teacher-code"} == services.keys() - {"job-trainer"}
    for name, of in (("math", "job-teacher-math"), ("code", "job-teacher-code")):
        spec = deployments[of]["spec"]
        picked = spec["selector"]["matchLabels"]
        assert (
            picked == services[of]["spec"]["selector"]
            and picked.items() <= spec["template"]["metadata"]["labels"].items()
        )
        assert picked["distillation-operator.io/teacher"] == name, "or each would take the other's pods"
        assert container(spec["template"])["command"] == ["python3", "-m", "distill_workers.serve", "teacher", name]
    assert deployments["job-teacher-math"]["spec"]["replicas"] == 3
    assert deployments["job-teacher-code"]["spec"]["template"]["spec"]["nodeSelector"] == {"gpu": "big"}


def test_the_trainer_is_told_where_each_teacher_serves() -> None:
    told = environment_of_trainer(several_teachers())["DISTILL_TEACHER_ADDRESS"]
    assert read_teacher_addresses(told) == {
        "math": "job-teacher-math:30000",
        "code": "job-teacher-code:30000",
        "shared": "poet-scoring:30000",
    }
    alone = environment_of_trainer(job())["DISTILL_TEACHER_ADDRESS"]
    assert read_teacher_addresses(alone) == {"teacher": "job-teacher:30000"}


def test_the_longest_names_of_job_and_teacher_make_a_name_that_a_service_may_have() -> None:
    assert len(names.teacher("j" * names.MAX_JOB_NAME, "t" * names.MAX_TEACHER_NAME)) == 63


AGREED = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0"}


def agreed(of: DistillationJob) -> dict[str, Json]:
    """What each role's environment says of NCCL's memory."""
    environments = {role: container(template)["env"] for role, template in pod_templates(of).items()}
    return {role: {e["name"]: e["value"] for e in env if e["name"] in AGREED} for role, env in environments.items()}


def test_both_ends_of_a_nccl_group_agree_about_its_memory() -> None:
    assert set(map(str, agreed(job(accelerator="nvidia.com/gpu", teacher={"model": "m"})).values())) == {str(AGREED)}


@pytest.mark.parametrize("role", ["trainer", "rollout"])
def test_a_variable_of_nccl_that_the_user_sets_for_one_end_is_set_for_the_other(role: str) -> None:
    template = {"env": [{"name": "NCCL_CUMEM_ENABLE", "value": "1"}]}
    found = agreed(job(accelerator="nvidia.com/gpu", teacher={"model": "m"}, **{role: {"template": template}}))
    assert set(map(str, found.values())) == {str({**AGREED, "NCCL_CUMEM_ENABLE": "1"})}


def test_a_flag_by_which_sglang_overrides_its_environment_counts_for_the_trainer_too() -> None:
    found = agreed(
        job(accelerator="nvidia.com/gpu", teacher={"model": "m"}, rollout={"engineArgs": ["--enable-nccl-nvls"]})
    )
    assert found["trainer"] == {**AGREED, "NCCL_NVLS_ENABLE": "1"}


def test_a_flag_by_which_sglang_overrides_its_environment_goes_before_what_the_user_sets() -> None:
    engines = {"engineArgs": ["--enable-nccl-nvls"], "template": {"env": [{"name": "NCCL_NVLS_ENABLE", "value": "0"}]}}
    found = agreed(job(accelerator="nvidia.com/gpu", teacher={"model": "m"}, rollout=engines))
    assert found["trainer"] == {**AGREED, "NCCL_NVLS_ENABLE": "1"}


def test_a_home_of_the_users_takes_the_place_of_the_pods_own() -> None:
    """Kernels that are compiled at the start are kept below it (docs/guides/sizing.md)."""
    template = {"env": [{"name": "HOME", "value": "/home/kernels"}]}
    made = pod_templates(job(accelerator="nvidia.com/gpu", teacher={"model": "m"}, rollout={"template": template}))
    homes = {role: [e["value"] for e in container(t)["env"] if e["name"] == "HOME"] for role, t in made.items()}
    assert homes["engine"] == ["/home/kernels"] and homes["trainer"] == homes["teacher"] == ["/tmp"]


def test_without_an_accelerator_no_variable_of_one_is_set() -> None:
    for template in pod_templates(job(accelerator="none", teacher={"model": "m"})).values():
        assert not [e for e in container(template)["env"] if e["name"].startswith(("NCCL_", "CUDA_", "PYTORCH_"))]


@pytest.mark.parametrize(("tensor", "connections"), [(1, None), (2, "1")])
def test_a_trainer_on_gpus_has_growing_segments_and_with_tensor_parallelism_one_connection(
    tensor: int, connections: str | None
) -> None:
    made = pod_templates(
        job(
            accelerator="nvidia.com/gpu",
            teacher={"model": "m"},
            trainer={"gpusPerNode": 2, "parallelism": {"tensor": tensor}},
        )
    )
    found = {e["name"]: e.get("value") for e in container(made["trainer"])["env"]}
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and found["NCCL_DEBUG"] == "WARN"
    assert found.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
    engine = {e["name"] for e in container(made["engine"])["env"]}
    assert not engine & {"PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"}
