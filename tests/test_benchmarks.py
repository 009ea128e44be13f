"""The benchmark: goals are judged rightly, rows and contenders fail by themselves, tables and JSON agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks", reason="the tests of an installed wheel have no benchmarks")

from benchmarks import backends, models, timing
from benchmarks.models import Classifier, Parts, conv_bn
from benchmarks.peers import PEERS, Peer, found
from benchmarks.report import Goal, Row
from benchmarks.rows import Benchmark, Setup, everything, gpu, growth, inference, training
from benchmarks.tables import header, line, markdown, write_json
from benchmarks.workloads import Where, classifier

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = {"float": [2.0, 4.0, 2.0], "torch.ao": [4.0, 4.0, 4.0], "swift": [1.0, 2.0, 1.0], "eagerq": [3.0, 3.0, 3.0]}


def row(*goals: Goal, samples: timing.Samples = SAMPLES, **notes: str) -> Row:
    return Row.of("A section", "a row", "ms", goals, samples, notes)


def tiny(parts: Parts) -> nn.Module:
    return Classifier(parts, [conv_bn(3, 4, 3, 4)], [nn.Linear(4, models.CLASSES)])


def setup(**changes: object) -> Setup:
    given = {"backends": backends.contenders("onednn"), "engine": "onednn", "repeats": 2, **changes}
    return Setup(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("goal", "reached", "met"),
    [
        (Goal("eagerq", 3000), 3000.0, True),
        (Goal("eagerq", 2999), 3000.0, False),
        (Goal("eagerq / float", 1.5), 1.5, True),  # pair by pair: 1.5, 0.75, 1.5
        (Goal("eagerq / torch.ao", 0.74), 0.75, False),
        (Goal("eagerq / best peer", 3.0), 3.0, True),  # the best is swift; float is no peer
        (Goal("eagerq / absent", 1.0), None, None),
    ],
)
def test_goals(goal: Goal, reached: float | None, met: bool | None) -> None:
    (found,) = row(goal).goals
    assert (found.reached, found.met) == (reached, met)


def test_own_variants_and_baselines_are_no_peers() -> None:
    samples = {**SAMPLES, "eagerq frozen": [0.1] * 3, "needed": [0.1] * 3, "float": [0.1] * 3}
    assert row(samples=samples).ratios["eagerq / best peer"] == 3.0


def test_one_row_has_several_goals() -> None:
    cells = line(row(Goal("eagerq / float", 1.3), Goal("eagerq / torch.ao", 1.0)))
    assert "eagerq / float ≤ 1.3, eagerq / torch.ao ≤ 1" in cells
    assert "no (1.50), yes (0.750)" in cells


def test_tables_and_json_agree(tmp_path: Path) -> None:
    rows = [row(Goal("eagerq / float", 1.3), brevitas="not installed")]
    write_json(tmp_path / "it.json", {"cpus": 2}, rows)
    (told,) = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))["rows"]
    for text in (line(rows[0]), markdown({"cpus": 2}, rows)):
        for figure in (*told["figures"].values(), told["ratios"]["eagerq / float"]):
            assert f"{figure:.0f}" if figure >= 100 else f"{figure:.2f}" in text
        assert "brevitas: not installed" in text
        assert "no (1.50)" in text
    assert told["goals"] == [{"figure": "eagerq / float", "limit": 1.3, "reached": 1.5, "met": False}]


def test_a_header_has_the_columns_of_its_lines() -> None:
    title, rule = header("A section").splitlines()[-2:]
    assert title.count("|") == rule.count("|") == line(row()).count("|")


def test_markdown_leaves_out_details_and_empty_columns() -> None:
    alone = {"eagerq": [1.0]}
    detail = Row.of("A section", "hidden", "ms", (), alone, {}, detail=True)
    shown = markdown({}, [row(samples=alone), detail])
    assert "hidden" not in shown
    assert "torch.ao" not in shown
    assert shown.strip().splitlines()[0].startswith("| A section | eagerq |")


def test_a_row_fails_by_itself() -> None:
    def broken(_: Setup) -> timing.Samples:
        raise ValueError("no such luck")

    done = Benchmark("A section", "broken", "ms", Goal("eagerq", 1), broken).run(setup())
    assert done.failed
    assert done.goals[0].met is None
    assert "ValueError: no such luck" in line(done)


def test_a_contender_fails_by_itself() -> None:
    def make(backend: backends.Backend) -> timing.Timed:
        if backend.name == "torch.ao":
            raise ValueError("not today")
        return lambda: 1.0

    asked = setup(peers={"training": {"absent": "not installed"}})
    samples = asked.race(make, "training")
    assert set(samples) == {"float", "eagerq"}
    assert asked.notes == {"absent": "not installed", "torch.ao": "ValueError: not today"}


def test_rows_for_a_gpu_say_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = Benchmark("A section", "far", "ms", Goal("eagerq", 1), lambda _: pytest.fail("ran"), cuda=True).run(setup())
    assert "not run: no GPU here" in line(done)
    assert not done.failed


def test_peers_that_are_missing_or_slow_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Peer("missing", "training", ("no_such_module",), backends.Backend)
    slow = Peer("slow", "inference", (), backends.Backend, slow=True)
    monkeypatch.setattr("benchmarks.peers.PEERS", (missing, slow))
    assert found() == {"training": {"missing": "not installed"}, "inference": {"slow": slow}}
    assert found(quick=True)["inference"] == {"slow": "not run (compiles)"}


def test_a_row_ends_when_its_time_is_up() -> None:
    assert len(timing.interleave({"it": lambda: 0.0}, 9)["it"]) == 9
    assert len(timing.interleave({"it": lambda: 0.0}, 9, most=0.0)["it"]) == 3


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def turn(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 0.0  # type: ignore[func-returns-value]

    timing.interleave({"a": turn("a"), "b": turn("b")}, 2)
    assert "".join(order) == "abbaab"


@pytest.mark.usefixtures("ao")
def test_rows_run_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.NETS, "tiny", tiny)
    rows = {one.name: one for one in (*training.benchmarks(), *inference.benchmarks())}
    for name in ("step tiny", "step tiny, channels_last", "late step tiny (observers off + BN frozen)"):
        done = rows[name].run(setup())
        assert set(done.figures) == {"float", "torch.ao", "eagerq"}, done.notes
        assert not done.notes


@pytest.mark.usefixtures("ao")
def test_growth_follows_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "CHAINS", (1, 2, 20))
    asked = setup()
    for one in growth.benchmarks():
        done = one.run(asked)
        assert {"torch.ao", "eagerq"} <= set(done.figures), done.notes
        assert all(goal.met is not None for goal in done.goals)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_rows_for_a_gpu_on_what_is_here(
    dtype: torch.dtype | None, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.NETS, "tiny", tiny)
    asked = setup(backends={"eagerq": backends.eagerq(), "float": backends.Backend()})
    assert set(gpu.steps("tiny", frozen, Where("cpu", 2, 32, dtype), asked)) == {"eagerq", "float"}
    assert set(gpu.forwards("tiny", 2, "cpu", asked)) == {"eagerq", "float"}
    assert not asked.notes


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.task == "inference"], ids=lambda peer: peer.name)
def test_inference_peers_run_the_same_model(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are installed; compiling is tested with the export."""
    if peer.missing or peer.slow:
        assert found(quick=True)[peer.task][peer.name] in ("not installed", "not run (compiles)")
        return
    monkeypatch.setitem(models.NETS, "tiny", tiny)
    images, torch_model = torch.randn(2, 3, 64, 64), classifier(backends.eagerq(), "tiny")
    backend = peer.backend()
    (scores,) = backend.deploy(classifier(backend, "tiny"), images)(images)  # type: ignore[misc]
    assert torch.allclose(torch.as_tensor(scores), torch_model(images), atol=0.1)


def test_names_are_unique() -> None:
    names = [one.name for one in everything()]
    assert len(names) == len(set(names))
    assert len({peer.name for peer in PEERS}) == len(PEERS)


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--no-peers", "--only"]
    run = subprocess.run([*command, "import eagerq"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "import eagerq over torch, ms" in run.stdout
    run = subprocess.run([*command, "no such row"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode
    assert "no row's name holds 'no such row'" in run.stderr
