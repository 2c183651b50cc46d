"""A SLURM cluster of two nodes on this machine, and two hosts whose network is cut.

Needs root, and Debian's slurm-wlm, munge and iproute2; else the tests are skipped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, launch, random_pairs, warm_python, write_jsonl
from safetensors.numpy import load_file

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NODES = ("n1", "n2")
MISSING = [name for name in ("sbatch", "slurmctld", "slurmd", "munged", "ip") if not shutil.which(name)]
if MISSING or os.geteuid():
    reason = f"not installed: {' '.join(MISSING)}" if MISSING else "must be root"
    pytest.skip(f"no cluster here: {reason}", allow_module_level=True)

SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=10
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=2000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, what, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


class Cluster:
    """The two nodes. `folder`: its files; `checkout`: where jobs are submitted from, and leave their logs."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder, folder / "checkout"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        (self.folder / "slurm.conf").write_text(SETTINGS.format(host=socket.gethostname(), folder=self.folder))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
        self.call("munged", "--force", f"--key-file={key}", *options)
        self.call("slurmctld")
        for node in NODES:
            self.call("slurmd", "-N", node)
        wait_for(
            lambda: self.call("sinfo", "--noheader", "--states=idle", "-o", "%D").strip() == "2", "two idle nodes"
        )
        self.checkout.mkdir()
        for name in ("scripts", "transencoder", "accelerate_configs"):
            (self.checkout / name).symlink_to(ROOT / name)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment)
        for name in ("n1", "n2", "slurmctld", "munge"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)

    def call(self, *words: object) -> str:
        words = [str(word) for word in words]
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, cwd=self.folder)
        assert result.returncode == 0, (words, result.stderr)
        return result.stdout

    def submit(self, *words: object) -> str:
        """Put `scripts/transencoder.slurm` into the queue; the job's number."""
        words = [str(word) for word in words]
        command = ["sbatch", "--parsable", f"--chdir={self.checkout}", *words]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.checkout)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def state(self, job: str) -> set[str]:
        return set(self.call("squeue", "--noheader", "--array", "--states=all", "-o", "%T", f"--jobs={job}").split())

    def restarts(self, job: str) -> int:
        shown = self.call("scontrol", "show", "job", job)
        return int(shown.partition("Restarts=")[2].split()[0])

    def output(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.checkout.glob(f"*-{job}*.out")))

    def finish(self, job: str, seconds: float = 300) -> None:
        """Wait until a job has ended well."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        wait_for(lambda: self.state(job) <= ended, f"the end of job {job}:\n{self.output(job)[-3000:]}", seconds)
        assert self.state(job) == {"COMPLETED"}, self.output(job)[-5000:]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    hosts, before = Path("/etc/hosts"), Path("/etc/hosts").read_text()
    hosts.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")  # nodes must have addresses
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        hosts.write_text(before)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    rows = [{**row, "score": row["score"] / 5} for row in random_pairs(64)]
    return write_jsonl(tmp_path_factory.mktemp("scores") / "scores.jsonl", rows)


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def losses(folder):
    return [entry["loss"] for entry in facts(folder)["history"]]


def training(tiny_bert, corpus, scores, output, epochs=4):
    """A training without dropout, so that two processes do what one does."""
    words = ["--model_name_or_path", tiny_bert, "--scores", scores, "--dev", corpus / "dev.jsonl", "--dropout", 0]
    words += ["--output_dir", output, "--total_batch_size", 16, "--learning_rate", "1e-3", "--mixed_precision", "no"]
    return ["scripts/distill_bi2cross.py", *words, "--num_epochs", epochs, "--checkpointing_steps", 3]


def test_a_stage_on_two_nodes_makes_what_one_process_makes(cluster, tiny_bert, corpus, scores, tmp_path):
    script, *words = training(tiny_bert, corpus, scores, tmp_path / "one")
    assert launch(Path(script).name, *words).returncode == 0
    given = training(tiny_bert, corpus, scores, tmp_path / "two")
    job = cluster.submit("--nodes=2", "scripts/transencoder.slurm", *given)
    cluster.finish(job)
    assert facts(tmp_path / "two")["world_size"] == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    # Each node has a log; what the first process says is in one of them, and in the job's own.
    logs = [(cluster.checkout / "logs" / f"{job}-node-{number}.log").read_text() for number in (0, 1)]
    assert sum("step 32/32" in log for log in logs) == 1 and "step 32/32" in cluster.output(job)


def recipe_of(students, corpus, path, **stages):
    """A recipe of one cycle without dropout."""
    stage = dict(total_batch_size=16, learning_rate=1e-3, dropout=0.0, eval_steps=100, checkpointing_steps=3)
    content = {
        "common": {"mixed_precision": "no"},
        "run_transencoder": {
            "students": students,
            "sentences": str(corpus / "sentences.txt"),
            "pairs": str(corpus / "pairs.jsonl"),
            "dev": f"mine.dev={corpus / 'dev.jsonl'}",
            "tasks": [f"mine={corpus / 'test.jsonl'}"],
            "cycles": 1,
        },
        "train_contrastive": {**stage, "pooling": "mean"},
        "distill_bi2cross": {**stage, "num_epochs": 20},
        "distill_cross2bi": {**stage, "num_epochs": 20},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def drive(recipe, run):
    """The same on this machine, with one process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{warm_python().path}:{os.environ['PATH']}",
    }
    command = ["bash", ROOT / "scripts" / "run_transencoder.sh", "--recipe", recipe, "--output_dir", run]
    result = subprocess.run(
        [*command, "--launcher", "python"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]


def scores_of(run):
    names = ("bi-scores", "cross-scores")
    return [pq.read_table(run / "cycle-1" / f"{name}.parquet")["score"].to_numpy() for name in names]


def test_a_run_that_is_stopped_and_loses_a_node_ends_as_one_left_alone(cluster, tiny_bert, corpus, tmp_path):
    """The driver on two nodes: a signal before the time limit, and a node that goes down, each puts the job back."""
    recipe = recipe_of([{"name": "one", "plm": str(tiny_bert)}], corpus, tmp_path / "recipe.yaml")
    drive(recipe, tmp_path / "alone")
    run = tmp_path / "run"
    job = cluster.submit("--nodes=2", "scripts/transencoder.slurm", "--recipe", recipe, "--output_dir", run)

    cross, bi = run / "cycle-1" / "cross-encoder" / "one", run / "cycle-1" / "bi-encoder" / "one"
    wait_for(lambda: list(cross.glob("checkpoints/step-*")), "a checkpoint of the cross-encoder")
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 does
    wait_for(lambda: cluster.restarts(job) == 1, "the first restart")
    wait_for(lambda: list(bi.glob("checkpoints/step-*")), "a checkpoint of the bi-encoder")
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_for(lambda: cluster.restarts(job) == 2, "the second restart")
    # It may have come back by itself, and then this is refused.
    subprocess.run(["scontrol", "update", "NodeName=n2", "State=RESUME"], env=cluster.environment, capture_output=True)
    cluster.finish(job)

    said = cluster.output(job)
    assert "stopped by a signal after step" in said and "the job goes back into the queue" in said
    assert len(facts(cross)["resumed_at_steps"]) >= 1 and len(facts(bi)["resumed_at_steps"]) >= 1
    assert facts(bi)["world_size"] == 2
    for ours, theirs in zip(scores_of(run), scores_of(tmp_path / "alone"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert (run / "results.md").exists()


def test_a_stage_that_fails_is_not_tried_again(cluster, corpus, tmp_path):
    words = ["--encoders", tmp_path / "nothing", "--pairs", corpus / "pairs.jsonl", "--output", tmp_path / "s.parquet"]
    job = cluster.submit("--nodes=2", "scripts/transencoder.slurm", "scripts/score_pairs.py", *words)
    wait_for(lambda: cluster.state(job) == {"FAILED"}, "the failure")
    assert "nothing: no such folder" in cluster.output(job) and cluster.restarts(job) == 0


def test_an_array_trains_each_student_in_a_job_of_its_own(cluster, tiny_bert, tiny_roberta, corpus, tmp_path):
    students = [{"name": "one", "plm": str(tiny_bert)}, {"name": "two", "plm": str(tiny_roberta)}]
    recipe = recipe_of(students, corpus, tmp_path / "recipe.yaml")
    drive(recipe, tmp_path / "alone")
    run = tmp_path / "run"
    job = cluster.submit("--array=0-1", "scripts/transencoder.slurm", "--recipe", recipe, "--output_dir", run)
    cluster.finish(job)
    for encoder in ("cross-encoder", "bi-encoder"):
        for student in ("one", "two"):
            ours, theirs = (
                load_file(r / "cycle-1" / encoder / student / "model.safetensors") for r in (run, tmp_path / "alone")
            )
            assert all(np.array_equal(value, theirs[name]) for name, value in ours.items())
    assert (run / "results.md").read_text().replace("# run", "# alone") == (
        tmp_path / "alone" / "results.md"
    ).read_text()
    assert "waiting for" in cluster.output(job)


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: their names, and addresses."""
    names, addresses = ("transencoder-a", "transencoder-b"), ("10.213.7.1", "10.213.7.2")
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)  # noqa: E731
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def at_work(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_host_that_is_cut_off_ends_the_run(hosts, tiny_bert, corpus, scores, tmp_path):
    (names, addresses), output = hosts, tmp_path / "out"
    script, *words = training(tiny_bert, corpus, scores, output, epochs=100_000)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    environment["TRANSENCODER_TIMEOUT"] = "20"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    launcher += ["--config_file", ROOT / "accelerate_configs" / "multi_gpu.yaml", "--num_machines", "2"]
    launcher += ["--main_process_ip", addresses[0], "--main_process_port", "29511", "--rdzv_backend", "c10d"]
    logs, launchers = [tmp_path / name for name in names], []
    for rank, name in enumerate(names):
        machine = ["--machine_rank", rank, "--rdzv_conf", f"is_host={1 - rank}", ROOT / script, *words]
        command = ["ip", "netns", "exec", name, *launcher, *machine]
        own = environment | {"PET_LOCAL_ADDR": addresses[rank]}  # both have this machine's name
        with logs[rank].open("w") as log:
            launchers.append(subprocess.Popen(list(map(str, command)), env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        wait_for(lambda: list(output.glob("checkpoints/step-*")), "a checkpoint", 120)
        workers = [psutil.Process(process.pid).children(recursive=True) for process in launchers]
        assert all(workers)
        subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "down"], check=True)
        assert launchers[0].wait(timeout=75) == 1
        # The launcher that is cut off may hang, waiting for the list of machines; its worker has ended.
        wait_for(lambda: not any(at_work(worker) for worker in workers[0] + workers[1]), "the workers' end", 30)
    finally:
        for process in launchers:
            process.kill()
            process.wait()
    line = (
        "has not answered within TRANSENCODER_TIMEOUT: is its machine down, or the network? The same command goes on"
    )
    for log in logs:
        said = log.read_text()
        assert said.count(line) == 1 and "Timed out waiting" not in said, said[-2000:]

    again = training(tiny_bert, corpus, scores, output, epochs=100_000)  # on the machine that is left
    worker = subprocess.Popen([sys.executable, *map(str, again)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert "going on from" in next(said for said in worker.stderr if "going on" in said or "error" in said)
    finally:
        worker.kill()
        worker.wait()
