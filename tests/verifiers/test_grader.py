"""The pool of workers after a fork, and with a worker whose reply belongs to another task."""

import json
import subprocess
import sys

import pytest

from sg_opd.verifiers import grader

# Parent and child write a line each: who, its verdicts, the workers before the fork, and its workers at its end.
START = r"""
import json, os, threading
from sg_opd import MathVerifier

verifier, verdicts = MathVerifier(timeout=10.0, workers=2), []

def workers():
    return sorted(worker.process.pid for worker in verifier._grader.pool)

def grade(answer, batches=60):
    return [verdict for _ in range(batches) for verdict in verifier([rf"\boxed{{{answer}}}"] * 5, ["x+x"] * 5)]

assert grade("2x", 1) == [1.0] * 5
before = workers()
"""
END = r"""
if child:
    assert os.waitpid(child, 0)[1] == 0
    verdicts += grade("2x", 1)
print(json.dumps(["parent" if child else "child", verdicts, before, workers()]), flush=True)
"""
GRADES = 'child = os.fork()\nverdicts = grade("2x" if child else "3x")'
CLOSES = "child = os.fork()\nif not child: verifier.close()"
ENDS = "child = os.fork()"
WHILE_A_THREAD_GRADES = r"""
batch = [r"\boxed{2x}"] * 1000, ["x+x"] * 1000
thread = threading.Thread(target=lambda: verdicts.extend(verifier(*batch)))
thread.start()
while not verifier._grader._lock.locked(): pass
child = os.fork()
if child: thread.join()
else: verdicts = grade("3x")
"""


def forked(what):
    run = subprocess.run([sys.executable, "-c", START + what + END], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return {who: rest for who, *rest in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize(
    ("child", "parents", "childs"),
    [(GRADES, 305, 300), (CLOSES, 5, 0), (ENDS, 5, 0), (WHILE_A_THREAD_GRADES, 1005, 300)],
    ids=["grades", "closes", "ends", "grades while a thread of the parent does"],
)
def test_a_child_shares_no_worker_with_its_parent(child, parents, childs):
    """All of the parent's answers are correct, none of the child's: verdicts that are swapped would show."""
    told = forked(child)
    verdicts, before, after = told["parent"]
    assert verdicts == [1.0] * parents
    assert after == before  # none was killed or replaced
    verdicts, before, after = told["child"]
    assert verdicts == [0.0] * childs
    assert not {*before} & {*after}


MISTAKEN = """
import json, sys

def reply(key, verdict=None):
    print(json.dumps({"key": key, "verdict": verdict, "spent": False}), flush=True)

reply(None)
for line in sys.stdin:
    key, reference, *_ = json.loads(line)
    reply("another" if reference == "mistaken" else key, 1.0)
"""


def test_a_reply_to_another_task_is_no_verdict(tmp_path, monkeypatch):
    """The task abstains, its worker is replaced, and the tasks after it are graded."""
    program = tmp_path / "mistaken.py"
    program.write_text(MISTAKEN)
    monkeypatch.setattr(grader, "PROGRAM", (str(program),))
    pool = grader.Grader(timeout=10.0, workers=1)
    tasks = [grader.Task(text, text) for text in ("2x", "mistaken", "3x")]
    assert pool.run(dict(enumerate(tasks))) == {0: 1.0, 1: None, 2: 1.0}
    assert pool.replaced == 1
    pool.close()
