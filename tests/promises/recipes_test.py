"""Recipes for schedulers, run: with stand-ins for SLURM's programs, and for pods."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest
from chiefs import end

ROOT = pathlib.Path(__file__).parents[2]
LAST = r"2 towers  loss \d\.\d{4}\n$"

# Two nodes, which are this machine.
STAND_INS = {
    "scontrol": """
        [ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\n127.0.0.1\\n'
    """,
    "srun": """
        [ "$1" = --ntasks-per-node=1 ] || exit 9
        while [[ $1 == --* ]]; do shift; done
        trap 'kill $(jobs -p)' EXIT
        for i in 0 1; do SLURM_NODEID=$i "$@" & done
        wait
    """,
    "python": f"""exec {sys.executable} "$@" """,
}


def free_port():
    """One that is free with the next, and so are their heartbeats'."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 64000 and all(
            map(is_free, (port, port + 1, port + 1000, port + 1001))
        ):
            return port


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class RecipesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        for name, script in STAND_INS.items():
            path = pathlib.Path(folder, name)
            path.write_text(f"#!/usr/bin/env bash\n{script}")
            path.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    def started(self, command, **environment):
        """A program in a session of its own, which ends with the test."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.addCleanup(end, process)
        return process

    def assert_trains(self, process, last=LAST):
        out, err = process.communicate(timeout=200)
        self.assertEqual(process.returncode, 0, err[-5000:])
        self.assertRegex(out, last)

    @pytest.mark.rare
    def test_examples_of_slurm(self):
        self.assert_trains(
            self.started(
                ["examples/slurm.sh"],
                SLURM_JOB_NODELIST="node[1-2]",
                PORT=str(free_port()),
            )
        )

    @pytest.mark.rare
    def test_examples_of_coming_from_another_strategy(self):
        process = self.started([sys.executable, "examples/multi_worker.py"])
        self.assert_trains(process, r"Epoch 3/3\n.*loss: 0\.\d+\n$")

    def kubernetes(self):
        """The commands of a worker and of the chief, and the workers' names."""
        text = (ROOT / "examples" / "kubernetes.yaml").read_text()
        worker, chief = (
            [word.strip(' "') for word in command.split(",")]
            for command in re.findall(r"command: \[(.*)\]", text)
        )
        kind = r"kind: StatefulSet\nmetadata: \{name: (\w+)\}"
        (name,) = re.findall(kind, text)
        (service,) = re.findall(r"serviceName: (\w+)", text)
        (replicas,) = re.findall(r"replicas: (\d+)", text)
        # As Kubernetes calls a StatefulSet's pods.
        pods = [f"{name}-{i}.{service}:2222" for i in range(int(replicas))]
        return worker, chief, pods

    def test_kubernetes_workers_have_the_names_that_the_chief_uses(self):
        worker, chief, pods = self.kubernetes()
        self.assertEqual(chief, ["python", "scheduled.py", *pods])
        self.assertContainsSubset(["--port=2222", "--host=0.0.0.0"], worker)
        text = (ROOT / "examples" / "kubernetes.yaml").read_text()
        self.assertRegex(text, r"kind: Service\nmetadata: \{name: workers\}")
        self.assertIn("clusterIP: None", text)

    @pytest.mark.rare
    def test_examples_of_kubernetes(self):
        worker, chief, pods = self.kubernetes()
        ports = [free_port() + i for i in range(len(pods))]
        for port in ports:
            self.started([w.replace("2222", str(port)) for w in worker])
        addresses = [f"127.0.0.1:{port}" for port in ports]
        program = chief[:1] + [f"examples/{chief[1]}"]
        self.assert_trains(self.started([*program, *addresses]))
