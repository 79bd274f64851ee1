"""The scaling law of the benchmarks: recovered from a synthetic law, and read from runs."""

import json
import subprocess
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks import small_law
from benchmarks.scaling_law import Sample, effective_tokens, fit_law, predict, read_samples
from tests.support.commands import fast_python

SIZES, TOKENS = (4.6e6, 9.0e6, 15.7e6, 26.9e6), (2e6, 4e6, 8e6, 16e6)
TRUE = {"E": 0.9, "A": 120.0, "alpha": 0.35, "B": 300.0, "beta": 0.4}


def true_loss(parameters: float, tokens: float) -> float:
    size, data = TRUE["A"] / parameters ** TRUE["alpha"], TRUE["B"] / tokens ** TRUE["beta"]
    return TRUE["E"] + size + data


def synthetic(noise: float = 0.0) -> list[Sample]:
    """Runs of the true law, with the speed of a machine that has 80 G parameters tokens/s."""
    errors = numpy.random.default_rng(1).normal(0, noise, len(SIZES) * len(TOKENS))
    return [
        Sample(f"{n:g}-{d:g}", n, d, true_loss(n, d) * float(numpy.exp(error)), 80e9 / n)
        for (n, d), error in zip(product(SIZES, TOKENS), errors, strict=True)
    ]


def test_the_law_of_exact_runs_is_recovered() -> None:
    law, resampled = fit_law(synthetic(), bootstraps=20)
    assert {k: float(v) for k, v in law.values().items()} == pytest.approx(TRUE, rel=1e-3)
    assert resampled.at(9.0e6, 8e6) == pytest.approx(numpy.full(20, true_loss(9.0e6, 8e6)), 1e-4)


def test_noise_and_an_outlier_hardly_change_predictions() -> None:
    """One of sixteen runs is 20 % worse, as one with a bad learning rate is."""
    samples = synthetic(noise=0.003)
    samples[5] = Sample(
        "bad", *[samples[5].parameters, samples[5].tokens, samples[5].loss * 1.2, 1.0]
    )
    law, resampled = fit_law(samples, bootstraps=200)
    predicted, true = float(law.at(9.0e6, 200e6)), true_loss(9.0e6, 200e6)
    assert predicted == pytest.approx(true, rel=0.03)
    low, high = numpy.percentile(resampled.at(9.0e6, 200e6), (5, 95))
    assert low < true < high
    assert high - low < 0.2


def test_the_best_shape_for_a_time_is_that_of_the_true_law() -> None:
    law, resampled = fit_law(synthetic(), bootstraps=20)
    speed = {n: 80e9 / n for n in SIZES}
    for seconds in (600, 28_800, 3e6):
        rows = predict(law, resampled, speed, seconds, None)
        best = min(rows, key=lambda row: row["bits_per_byte"])["parameters"]
        assert best == min(SIZES, key=lambda n: true_loss(n, speed[n] * seconds))
        assert sum(row["best_share"] for row in rows) == pytest.approx(1)
    repeated = predict(law, resampled, speed, 28_800, 100e6)[0]
    assert repeated["epochs"] == pytest.approx(80e9 / 4.6e6 * 28_800 / 100e6)
    fresh = predict(law, resampled, speed, 28_800, None)[0]
    assert repeated["bits_per_byte"] > fresh["bits_per_byte"]


def test_repeated_tokens_count_less() -> None:
    assert effective_tokens(5e7, 1e8) == 5e7
    assert effective_tokens(1e8, 1e8) == 1e8
    assert 3.7e8 < effective_tokens(4e8, 1e8) < 4e8
    assert effective_tokens(4e9, 1e8) < 1.7e9


def test_too_few_or_equal_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 runs with different sizes; at least 6"):
        fit_law(synthetic()[:5])
    with pytest.raises(ValueError, match="the same number of parameters"):
        fit_law([*synthetic()[:4], *synthetic()[:4]])


def write_run(folder: Path, sample: Sample, settings: str = "seq_len = 256") -> None:
    """Write the files of a finished run as training does."""
    folder.mkdir(parents=True)
    recipe = f'objective = "pretrain"\ntokenizer = "tokenizer"\n[data]\n{settings}\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("")
    summary: dict[str, Any] = {"steps": 1, "bits_per_byte": sample.loss}
    summary |= {"parameters": int(sample.parameters), "tokens": int(sample.tokens)}
    summary["tokens_per_second"] = sample.speed
    (folder / "summary.json").write_text(json.dumps(summary))


def test_record_of_a_sweep(tmp_path: Path) -> None:
    """Of two learning rates the better counts; another data mix is refused; the page is written."""
    samples = synthetic()
    for number, sample in enumerate(samples):  # with the same files in other folders
        moved = f'seq_len = 256\nstore = "{number}"\nsources = [{{path = "{number}/texts"}}]'
        write_run(tmp_path / "law" / sample.name, sample, moved)
    worse = Sample("worse", *[samples[0].parameters, samples[0].tokens, 9.0, 1.0])
    write_run(tmp_path / "law" / "worse", worse, moved)
    final = Sample("night", 9.0e6, 200e6, 1.02 * true_loss(9.0e6, 200e6), 1.0)
    write_run(tmp_path / "night", final)
    command = [*fast_python(), "-m", "benchmarks.scaling_law"]
    command += [str(tmp_path / "law"), "--hours", "8"]
    command += ["--final", str(tmp_path / "night"), "--out", str(tmp_path / "out" / "record")]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "| 9e+06-8e+06 | 9.0M | 8.0M |" in printed
    assert "worse" not in printed
    assert "+2.00%, within the tolerance of 3%" in printed
    assert (tmp_path / "out" / "record.md").read_text() == printed[:-1].replace(
        "law.svg", "record.svg"
    )
    assert (tmp_path / "out" / "record.svg").read_text().startswith("<svg")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["law"]["E"]["value"] == pytest.approx(0.9, rel=1e-3)
    assert read_samples([tmp_path / "out" / "record.json"]) == read_samples([tmp_path / "law"])
    write_run(tmp_path / "law" / "other", samples[0], "seq_len = 512")
    with pytest.raises(ValueError, match="and other differ in data, sequence length or tokenizer"):
        read_samples([tmp_path / "law"])


def test_record_of_small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer run and the repeated text are compared with the law of the short runs."""
    monkeypatch.setattr(small_law.scaling_law, "fit_law", partial(fit_law, bootstraps=50))
    unique = {"all": 9_000_000} | {str(epochs): 1e6 / epochs for epochs in small_law.EPOCHS}
    (tmp_path / "unique.json").write_text(json.dumps(unique))
    sizes = {"0.1M": 0.1e6, "0.2M": 0.2e6, "0.5M": 0.5e6, "1M": 1e6, "2M": 2e6}
    runs = [(f"law-{shape}", shape, d) for shape, ds in small_law.TOKENS.items() for d in ds]
    runs += [("final", *small_law.FINAL)]
    runs += [(f"repeated-{epochs}", *small_law.REPEATED) for epochs in small_law.EPOCHS]
    for folder, shape, tokens in runs:
        run = tmp_path / folder / f"{tokens:g}"
        write_run(run, Sample("", sizes[shape], tokens, true_loss(sizes[shape], tokens), 1.0))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"unigram_bits_per_byte": 3.4}))
    small_law.record(tmp_path, tmp_path / "out" / "small")
    record = json.loads((tmp_path / "out" / "small.json").read_text())
    assert len(record["runs"]) == 16
    assert record["final"]["predicted"] == pytest.approx(true_loss(2e6, 1e6), rel=1e-3)
    four, _, many = record["repeated"]
    assert four["predicted"] == pytest.approx(
        true_loss(0.5e6, effective_tokens(1e6, 0.25e6)), rel=1e-3
    )
    assert many["predicted"] > four["predicted"] > four["bits_per_byte"]
    page = (tmp_path / "out" / "small.md").read_text()
    assert "| 64 | 0.02M | 1.00M |" in page
    assert "(small.svg)" in page and "9.0M tokens in all" in page
