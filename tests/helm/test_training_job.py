"""The training Job, run: its own arguments and recipe, in folders in place of its volumes, beside a running server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helm.chart import Object, objects, of_kind, render_text, the
from helm.deploy.routed import free_ports
from support.live_server import LiveServer
from support.server_fixture import make_base

from quiver import AdapterNotFound
from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.base.load import load_base

pytestmark = pytest.mark.slow
RECIPE = {
    "adapter": {"method": "lora", "adapter_dim": 2, "target_modules": ["attention"]},
    "data": {"train": "/data/train.jsonl"},
    "max_steps": 2,
}
SHARED = ("--set", "adapters.volume.accessModes={ReadWriteMany}")


def job(recipe: Object, *more: str, nodes: int = 1) -> list[Object]:
    values = {"data": {"configMap": "rows"}, "jobs": [{"name": "routing", "recipe": recipe, "nodes": nodes}]}
    return objects(render_text("--set-json", f"training={json.dumps(values)}", *more))


def commands(items: list[Object], volumes: dict[str, Path]) -> list[list[str]]:
    """What the containers of the Job's pods would run: `volumes` are the folders in place of their mounts."""
    spec = the(items, "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    config = next(volume["configMap"]["name"] for volume in spec["volumes"] if volume["name"] == "recipe")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    text = the(items, "ConfigMap", config)["data"]["recipe.yaml"]
    arguments = container["args"]
    places = {mounts[name]: str(folder) for name, folder in volumes.items() if name in mounts}
    places |= {"/opt/quiver/demo-base": str(volumes["base"])}
    for inside, outside in places.items():
        text = text.replace(f"{inside}/", f"{outside}/")
        arguments = [argument.replace(inside, outside) for argument in arguments]
    (volumes["recipe"] / "recipe.yaml").write_text(text)
    if "command" not in container:
        return [[sys.executable, "-m", "quiver.cli", *arguments]]
    program, *options = container["command"]
    assert program == "python"
    nodes = the(items, "Job")["spec"]["completions"]
    return [[sys.executable, *(on_node(word, index, items) for word in options), *arguments] for index in range(nodes)]


def on_node(word: str, index: int, items: list[Object]) -> str:
    """A word of the command as the kubelet fills it in there; the name of pod 0 is this machine."""
    name = the(items, "Job")["metadata"]["name"]
    (container,) = the(items, "Job")["spec"]["template"]["spec"]["containers"]
    (variable,) = (item for item in container["env"] if item["name"] == "NODE_RANK")
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return word.replace("$(NODE_RANK)", str(index)).replace(f"{name}-0.{name}", "127.0.0.1")


def run_job(items: list[Object], volumes: dict[str, Path]) -> list[tuple[int, str]]:
    """A Job run to its end: exit code and output of each of its pods."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (free,) = free_ports(1)
    running = [
        subprocess.Popen(
            [word.replace("=29500", f"={free}") for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands(items, volumes)
    ]
    printed = [process.communicate(timeout=200)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, printed, strict=True)]


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("base", "adapters", "data", "recipe")}
    for folder in folders.values():
        folder.mkdir()
    make_base(folders["base"])
    rows = [{"prompt": f"Ticket {number}:", "completion": " billing"} for number in range(8)]
    (folders["data"] / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


def test_the_adapter_is_served_as_soon_as_the_job_has_ended(volumes: dict[str, Path], tmp_path: Path) -> None:
    server = LiveServer(volumes["base"], volumes["adapters"], tmp_path / "log")
    try:
        with server.client() as client:
            with pytest.raises(AdapterNotFound):
                client.generate("Ticket 1:", adapter="routing", max_new_tokens=2)
            ((code, printed),) = run_job(job(RECIPE), volumes)
            assert code == 0, printed
            answer = client.generate("Ticket 1:", adapter="routing", max_new_tokens=2)
        assert answer.adapter is not None
        assert answer.adapter.methods == ("lora",)
        revision = json.loads((volumes["adapters"] / "routing" / "quiver.json").read_text())["revision"]
        assert answer.adapter.revision == revision
    finally:
        assert server.stop() == 0
    assert [folder.name for folder in volumes["adapters"].iterdir()] == ["routing"], "something was left behind"
    # The Job that a node's failure starts again has nothing left to do.
    ((code, printed),) = run_job(job(RECIPE), volumes)
    assert code == 0, printed
    assert "finished already" in printed


def test_two_nodes_train_one_adapter(volumes: dict[str, Path]) -> None:
    """Each started alone, with the command of its pod; they meet at pod 0."""
    pods = run_job(job({**RECIPE, "parallel": {"tensor": 2}}, *SHARED, nodes=2), volumes)
    assert [code for code, _ in pods] == [0, 0], "\n".join(printed for _, printed in pods)
    assert [folder.name for folder in volumes["adapters"].iterdir()] == ["routing"]
    base = load_base(volumes["base"], dtype=torch.float32, device="cpu")
    read_adapter(volumes["adapters"] / "routing", base=base)


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_trying_again_cannot_mend_ends_the_job(volumes: dict[str, Path], nodes: int) -> None:
    """Exit code 2, which the Job's failure policy names."""
    items = job({**RECIPE, "batch_syze": 4}, *SHARED, nodes=nodes)
    pods = run_job(items, volumes)
    rule, _ = the(items, "Job")["spec"]["podFailurePolicy"]["rules"]
    assert [code for code, _ in pods] == rule["onExitCodes"]["values"] * nodes
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == "train"
    assert all("batch_syze is not a known key" in printed for _, printed in pods)


def test_another_recipe_is_another_job() -> None:
    """A Job's template cannot be changed; helm would fail to upgrade one of the same name."""

    def name(*more: str, **changes: object) -> str:
        return the(job({**RECIPE, **changes}, *more), "Job")["metadata"]["name"]

    assert name() == name()
    others = {name(), name(max_steps=3), name("--set", "image.tag=two"), name("--set", "training.backoffLimit=9")}
    others.add(name("--set", "resources.requests.cpu=7", "--set", "nodeSelector.disk=fast"))
    assert len(others) == 5, "what is in the template must be in the name"


def test_a_volume_of_one_node_keeps_the_job_beside_the_server() -> None:
    spec = the(job(RECIPE), "Job")["spec"]["template"]["spec"]
    (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    server = the(job(RECIPE), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= server.items()
    shared = job(RECIPE, *SHARED)
    assert "affinity" not in the(shared, "Job")["spec"]["template"]["spec"]
    assert len(of_kind(shared, "Job")) == 1
