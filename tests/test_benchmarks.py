"""The benchmark for GPUs runs on a CPU as well, with tiny models: so all of its parts work where the first GPU is met."""
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import bench_gpu

FLAGS = ["--device", "cpu", "--tiny"]
PLAIN = [*FLAGS, "--no-compile"]
MACHINE = bench_gpu.CPU


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--checks"]) == 0 and "no GPU" in capsys.readouterr().out


def test_all_checks_are_ok(monkeypatch, capsys):
    """Of torch.compile only what reads the code: the compilers behind it take half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert bench_gpu.main([*FLAGS, "--variants", "--checks"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match("(ok|FAILED|told|left out) ", line)]
    assert len(lines) == len(bench_gpu.CHECKS) and all(line.startswith(("ok ", "told ")) for line in lines), lines
    assert sum(line.startswith("ok ") for line in lines) == len(lines) - 3      # a time, and two that only CUDA tells


def test_what_is_wrong_fails(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu.chapter4, "orthogonalise", lambda matrices: matrices)
    monkeypatch.setattr(bench_gpu.chapter5, "generate", None)
    monkeypatch.setattr(bench_gpu.chapter3, "attention_in_blocks", lambda q, k, v, visible: q)
    wrong = [bench_gpu.check_orthogonalise, bench_gpu.check_cached_writing_equals_plain_writing, bench_gpu.check_kinds_in_16_bits]
    monkeypatch.setattr(bench_gpu, "CHECKS", wrong)
    assert bench_gpu.main([*PLAIN, "--variants", "--checks"]) == 1 and "3 FAILED" in capsys.readouterr().out


def test_every_variant_is_measured(tmp_path):
    for variant in bench_gpu.VARIANTS:
        row = bench_gpu.measure(variant, replace(MACHINE, precision="bf16"), bench_gpu.parse(PLAIN))
        assert 0 < row["tokens/s"] < math.inf and 0 < row["first step, s"] < math.inf and row["remark"] == ""
    assert bench_gpu.make_model("nanogpt", "gpu", True).layers[0].input_layernorm.bias is None


def test_a_variant_without_memory_or_time_is_a_row_of_the_table(monkeypatch, tmp_path, capfd):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(bench_gpu, "measure", full)
    flags = bench_gpu.parse([*PLAIN, "--variants", "nanogpt", "blocks", "--result", str(tmp_path / "row.json")])
    assert "out of memory at 2 sequences" in bench_gpu.measure_here("blocks", MACHINE, flags)["remark"]
    assert "out of memory" in flags.result.read_text()
    flags.seconds = 1
    bench_gpu.show_rows(bench_gpu.measure_all(MACHINE, flags, PLAIN), flags)
    assert re.search(r"blocks +left out: no time", capfd.readouterr().out)


def test_the_whole_prints_a_table_last(tmp_path, monkeypatch, capfd):
    """With a process for the variant, and two scripts of the course."""
    few = {name: flags for name, flags in bench_gpu.COURSE.items() if name[:2] in ("01", "02")}
    monkeypatch.setattr(bench_gpu, "COURSE", few)
    assert bench_gpu.main([*PLAIN, "--variants", "nanogpt", "--course", "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"\nnanogpt +[\d,]+ .* 1\.000", printed) and re.search(r"\ncourse: 01 \d+ s, 02 \d+ s\n", printed)
    assert (tmp_path / "out" / "data" / "meta.json").exists()


def test_what_the_course_found_is_told():
    text = "step 1\nheld-out loss 2.500, 1.300 bits per byte \nheld-out loss 2.400, 1.200 bits per byte \nsaved"
    assert "1.200 bits per byte, of 2" in bench_gpu.found_in("04_train.py", text)[0]
    told = "\n".join(bench_gpu.found_in("06_finetune.py", "> Write\n\n tasks  pass@1  no end\nnew names 150 90%\nchapter 4's"))
    assert told == "   tasks  pass@1  no end\n  new names 150 90%\n  chapter 4's"


def test_presets_give_the_step():
    for preset, expected in (("modern-124m", (1024, 32, 16)), ("gpu", (256, 128, 1))):
        flags = bench_gpu.parse(["--preset", preset])
        assert (flags.context, flags.micro_batch, flags.accumulate) == expected


def test_operations_a_token_are_those_of_chapter_3(capsys):
    model = bench_gpu.make_model("auto", "modern-124m", True)
    bench_gpu.chapter3.show_parts(model.config)
    told = float(re.search(r"([\d.,]+) MFLOP", capsys.readouterr().out)[1])
    assert bench_gpu.flops_of(model) / 1e6 == pytest.approx(told, rel=0.2)       # the norms, which are few, count there
