"""The runner on a Dask cluster: a scheduler and two worker processes on this machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client

from mmfm_utils import UsageError, runner
from mmfm_utils.runner import executors
from tests.test_runner import MEASURE, World, judge

PACKAGE = Path(__file__).resolve().parents[1]
SLOW = "import time\nfor _ in range(600): time.sleep(0.1)"


class Cluster:
    """A scheduler and workers, each a process of its own; `at` is what --executor takes."""

    def __init__(self, folder, workers=2):
        self.folder, self.processes = folder, []
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("DASK")}
        self.env |= {"PYTHONPATH": str(PACKAGE), "DASK_DISTRIBUTED__WORKER__USE_FILE_LOCKING": "False"}
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", "at.json")
        while not (folder / "at.json").exists() or not (told := (folder / "at.json").read_text()):
            time.sleep(0.05)
        self.at = json.loads(told)["address"].replace("tcp", "dask")
        self.workers = [self.worker() for _ in range(workers)]

    def start(self, what, *arguments, **env):
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
        log = (self.folder / f"{what}.log").open("ab")
        self.processes.append(subprocess.Popen(command, cwd=self.folder, env=self.env | env, stdout=log, stderr=log))
        return self.processes[-1]

    def worker(self, **env):
        address = self.at.replace("dask", "tcp")
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
        return self.start("worker", address, *options, **env)

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        made = World(tmp_path_factory.mktemp("world"))
        patch.setenv("MMFM_ROOT", str(made.folder))
        yield made


@pytest.fixture(scope="module")
def cluster(world, tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    wait_for(lambda: workers_of(made) == 2)
    yield made
    made.close()


def wait_for(what, seconds=180):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def workers_of(cluster):
    """How many workers the scheduler knows."""
    with Client(cluster.at.replace("dask", "tcp"), timeout=20) as client:
        return len(client.scheduler_info(n_workers=-1)["workers"])


def kernels_of(process):
    """The kernels that a worker has started."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]
    return []


def results(world):
    rows = {
        path.stem: json.loads(path.read_text()) for path in (world.folder / "results" / "tiny").glob("[a-z]_*.json")
    }
    told = ("status", "reason", "rows", "metrics", "problems", "loaded", "key")
    for result in rows.values():
        for row in result["rows"]:
            row |= {"seconds": 0, "peak_mb": 0}
    return {name: {key: result[key] for key in told} for name, result in rows.items()}


# One cluster for all, so in this order: the last test kills a worker.


def test_results_are_those_of_threads(world, cluster):
    names = ("a_judged", "a_measured", "a_fails")
    world.add("a_judged", judge("D1"), finding="D1")
    world.add("a_measured", MEASURE)
    world.add("a_fails", "assert False, 'as it should'")
    assert world.run(*names, executor=cluster.at)[0] == 1
    there = results(world)
    shutil.rmtree(world.folder / "results")
    assert world.run(*names, jobs=2)[0] == 1
    assert there == results(world) and there["a_judged"]["status"] == there["a_measured"]["status"] == "ok"


def test_a_worker_of_another_version_is_refused(world, cluster, tmp_path_factory):
    world.add("b_measured", MEASURE)
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(PACKAGE / "mmfm_utils", other / "mmfm_utils")
    shutil.copytree(PACKAGE / "data", other / "data", ignore=shutil.ignore_patterns("*.safetensors"))
    with (other / "mmfm_utils" / "metrics.py").open("a") as file:
        file.write("# another version\n")
    stranger = cluster.worker(PYTHONPATH=str(other))
    wait_for(lambda: workers_of(cluster) == 3)
    with pytest.raises(UsageError, match="1 of 3 workers have another version of this project, or none") as error:
        world.run("b_measured", executor=cluster.at)
    assert len(str(error.value).splitlines()) == 1 and "b_measured" not in results(world)
    stranger.kill()
    wait_for(lambda: workers_of(cluster) == 2)


def test_an_interrupt_ends_the_kernels_on_the_workers(world, cluster):
    names = ("c_slow", "d_slow", "e_slow")
    for name in names:
        world.add(name, SLOW, MEASURE)
    command = [sys.executable, "-m", "mmfm_utils.cli", "run", *names, "--executor", cluster.at]
    env = os.environ | {"PYTHONPATH": str(PACKAGE)}
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = wait_for(lambda: all(k := [kernels_of(worker) for worker in cluster.workers]) and sum(k, []))
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "Interrupted after 0 of 3" in said and "Traceback" not in said, said
    wait_for(lambda: not any(kernel.is_running() for kernel in found), 20)
    time.sleep(2)  # none of those that waited begins
    assert not any(map(kernels_of, cluster.workers))
    world.add("f_quick", MEASURE)  # and the same workers go on
    assert world.run("f_quick", executor=cluster.at)[0] == 0


def test_a_killed_worker_costs_its_notebook_and_no_other(world, cluster):
    kill = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    names = ("g_kills", "h_one", "i_two")
    world.add("g_kills", kill, MEASURE)
    for name in names[1:]:
        world.add(name, MEASURE)
    code, _ = world.run(*names, executor=cluster.at)
    found = {name: result for name, result in results(world).items() if name in names}
    status = {name: result["status"] for name, result in found.items()}
    assert code == 1 and status == {"g_kills": "failed", "h_one": "ok", "i_two": "ok"}
    assert "its worker was killed" in found["g_kills"]["reason"]


def test_a_cluster_without_workers_is_refused(world, tmp_path_factory):
    world.add("a_measured", MEASURE)
    made = Cluster(tmp_path_factory.mktemp("empty"), workers=0)
    try:
        with pytest.raises(UsageError, match="has no workers: start some with `dask worker 127.0.0.1:"):
            world.run(executor=made.at)
    finally:
        made.close()


def test_threads_and_dask_are_made_by_name():
    pool = executors.make_executor("local", 3)
    assert pool.where == "3 at once"
    pool.shutdown()
    with pytest.raises(UsageError, match="write local, or dask://HOST:PORT"):
        runner.run(executor="ray")
