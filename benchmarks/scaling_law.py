"""Held-out bits per byte by parameters and tokens: a law fitted to short runs, and its predictions.

    python -m benchmarks.scaling_law out/sweep/law --hours 8 --out benchmarks/records/night/law
    python -m benchmarks.scaling_law out/sweep/law --hours 1 --speed 26.9e6=1.2e6   # elsewhere
    python -m benchmarks.scaling_law out/sweep/law --final out/night/pretrain       # check it
    python -m benchmarks.scaling_law law.json --final out/night/pretrain            # from a record

The law is L(N, D) = E + A / N^alpha + B / D^beta, with N parameters and D training tokens
(Hoffmann et al. 2022, equation 2). As in their section 3.3, the five values minimize the sum of
Huber losses (delta 0.001) of the logarithm of L, from several initial values. Each run must have
its own complete learning-rate schedule. Of several runs with the same N and D, such as those of a
sweep over learning rates, the best one counts. Intervals are from fits to resampled runs.

Tokens that are seen repeatedly count less than new ones (Muennighoff et al. 2023, section 3.1,
with their constant): see `effective_tokens`.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy
from numpy.typing import NDArray

from benchmarks.gpu.markdown import table
from minimind.reporting.plots import Line, as_file, draw
from minimind.reporting.runs import Run, find_runs, read_run

Floats = NDArray[numpy.float64]
_HUBER_DELTA = 1e-3  # of Hoffmann et al., section 3.3
_ROUNDS = 300
_MIN_RUNS = 6  # one more than the law has values
_REPETITIONS = 15.39  # R_D* of Muennighoff et al. 2023: the half-life of repeated data, in epochs
_BOOTSTRAPS = 1_000
_INTERVAL = (5, 95)  # percentiles
_TOLERANCE = 0.03  # of a prediction
# Identical in all runs of a fit; other settings, such as learning rates, may vary.
_COMPARABLE = ("data", "tokenizer")


@dataclass(frozen=True)
class Sample:
    """A finished run: parameters, training tokens, held-out bits per byte, tokens per second."""

    name: str
    parameters: float
    tokens: float
    loss: float
    speed: float


@dataclass(frozen=True)
class Law:
    """The law E + A / N^alpha + B / D^beta in a form that is well conditioned.

    theta: float64 (..., 5), the logarithms of the three terms at `center` (floor, parameters,
    tokens), and those of alpha and beta. center: the means of log N and log D of the runs.
    """

    theta: Floats
    center: tuple[float, float]

    def at(self, parameters: float | Floats, tokens: float | Floats) -> Floats:
        """Return the loss, one value per law in `theta`."""
        u = numpy.log(parameters) - self.center[0]
        v = numpy.log(tokens) - self.center[1]
        return numpy.asarray(sum(_terms(self.theta, u, v)))

    def values(self) -> dict[str, Floats]:
        """Return E, A, alpha, B and beta."""
        floor, a, b, log_alpha, log_beta = numpy.moveaxis(self.theta, -1, 0)
        alpha, beta = numpy.exp(log_alpha), numpy.exp(log_beta)
        return {
            "E": numpy.exp(floor),
            "A": numpy.exp(a + alpha * self.center[0]),
            "alpha": alpha,
            "B": numpy.exp(b + beta * self.center[1]),
            "beta": beta,
        }


def _terms(theta: Floats, u: Floats | float, v: Floats | float) -> tuple[Floats, Floats, Floats]:
    """Return the three terms of the law. u, v: logarithms of N and D relative to the center."""
    # --8<-- [start:law]
    floor, a, b, log_alpha, log_beta = numpy.moveaxis(theta, -1, 0)
    return (
        numpy.exp(floor),
        numpy.exp(a - numpy.exp(log_alpha) * u),
        numpy.exp(b - numpy.exp(log_beta) * v),
    )
    # --8<-- [end:law]


def fit_law(samples: Sequence[Sample], bootstraps: int = _BOOTSTRAPS) -> tuple[Law, Law]:
    """Fit the law to runs; return it, and the laws of `bootstraps` resamplings of the runs.

    Raises ValueError for too few runs, or runs with fewer than two values of N or of D.
    """
    if len(samples) < _MIN_RUNS:
        raise ValueError(f"{len(samples)} runs with different sizes; at least {_MIN_RUNS} needed")
    n, d, losses = numpy.array([(s.parameters, s.tokens, s.loss) for s in samples]).T
    for what, values in (("parameters", n), ("tokens", d)):
        if len(numpy.unique(values)) < 2:
            raise ValueError(f"all runs have the same number of {what}; vary it")
    x, y = numpy.log(n), numpy.log(d)
    center = (float(x.mean()), float(y.mean()))
    u, v, log_loss = x - center[0], y - center[1], numpy.log(losses)
    starts = numpy.array(
        [
            [
                log_loss.min() + math.log(floor),
                log_loss.min() + math.log((1 - floor) * share),
                log_loss.min() + math.log((1 - floor) * (1 - share)),
                math.log(alpha),
                math.log(beta),
            ]
            for floor, share, alpha, beta in itertools.product(
                (0.2, 0.5, 0.8), (0.2, 0.5, 0.8), (0.2, 0.5), (0.2, 0.5)
            )
        ]
    )
    thetas, costs = _minimize(starts, u, v, log_loss, numpy.ones((len(starts), len(samples))))
    theta = thetas[numpy.argmin(costs)]
    generator = numpy.random.default_rng(0)
    draws = generator.integers(0, len(samples), (bootstraps, len(samples)))
    counts = numpy.array([numpy.bincount(draw_, minlength=len(samples)) for draw_ in draws], float)
    resampled, _ = _minimize(numpy.tile(theta, (bootstraps, 1)), u, v, log_loss, counts)
    return Law(theta, center), Law(resampled, center)


def _minimize(
    theta: Floats, u: Floats, v: Floats, log_loss: Floats, counts: Floats
) -> tuple[Floats, Floats]:
    """Minimize the Huber losses of the residuals by Levenberg-Marquardt steps, for many fits.

    theta: (fits, 5), the initial values. u, v, log_loss: (runs,). counts: (fits, runs), the weight
    of each run. Returns the values and the objectives, (fits,). Huber's loss is minimized by
    weighted least squares: a residual r counts with the weight min(1, delta / |r|).
    """
    damping = numpy.full(len(theta), 1e-2)
    residuals, jacobian = _linearize(theta, u, v, log_loss)
    cost = (counts * _huber(residuals)).sum(1)
    for _ in range(_ROUNDS):
        weights = counts * numpy.minimum(
            1, _HUBER_DELTA / numpy.maximum(numpy.abs(residuals), 1e-300)
        )
        gradient = numpy.einsum("fr,fr,frp->fp", weights, residuals, jacobian)
        hessian = numpy.einsum("fr,frp,frq->fpq", weights, jacobian, jacobian)
        scale = numpy.einsum("fpp->fp", hessian) + 1e-9 * weights.sum(1)[:, None]
        damped = hessian + (damping[:, None] * scale)[:, None] * numpy.eye(5)
        step = numpy.linalg.solve(damped + 1e-12 * numpy.eye(5), -gradient[..., None])[..., 0]
        candidate = theta + numpy.clip(step, -1, 1)
        new_residuals, new_jacobian = _linearize(candidate, u, v, log_loss)
        new_cost = (counts * _huber(new_residuals)).sum(1)
        better = new_cost < cost
        theta = numpy.where(better[:, None], candidate, theta)
        residuals = numpy.where(better[:, None], new_residuals, residuals)
        jacobian = numpy.where(better[:, None, None], new_jacobian, jacobian)
        cost = numpy.where(better, new_cost, cost)
        damping = numpy.clip(numpy.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return theta, cost


def _huber(residuals: Floats) -> Floats:
    # --8<-- [start:huber]
    size = numpy.abs(residuals)
    linear = _HUBER_DELTA * (size - _HUBER_DELTA / 2)
    return numpy.where(size <= _HUBER_DELTA, residuals**2 / 2, linear)
    # --8<-- [end:huber]


def _linearize(theta: Floats, u: Floats, v: Floats, log_loss: Floats) -> tuple[Floats, Floats]:
    """Return log L(N, D) - log L of each run, (fits, runs), and its derivative by theta."""
    columns = theta[:, None]
    floor, by_size, by_tokens = numpy.broadcast_arrays(*_terms(columns, u, v))
    total = floor + by_size + by_tokens
    slopes = [
        floor,
        by_size,
        by_tokens,
        -by_size * numpy.exp(columns[..., 3]) * u,
        -by_tokens * numpy.exp(columns[..., 4]) * v,
    ]
    return numpy.log(total) - log_loss, numpy.stack(slopes, -1) / total[..., None]


def effective_tokens(tokens: float, unique: float) -> float:
    """Return how many new tokens are worth `tokens` from data with `unique` tokens.

    U + U R* (1 - exp(-R / R*)) with R = tokens / unique - 1 repetitions: four epochs are worth
    almost four times the data, forty much less than forty times (Muennighoff et al. 2023).
    """
    # --8<-- [start:effective-tokens]
    repetitions = max(tokens / unique - 1, 0)
    extra = _REPETITIONS * (1 - math.exp(-repetitions / _REPETITIONS))
    return min(tokens, unique) + unique * extra
    # --8<-- [end:effective-tokens]


def read_samples(paths: Sequence[Path]) -> list[Sample]:
    """Read the finished pretraining runs in folders and records; of equal N and D, the best one.

    A record is a JSON file that this program has written. Raises ValueError if it is another file,
    or if runs in folders have different data, sequence lengths or tokenizers, which records do not
    state.
    """
    folders = [path for path in paths if path.suffix != ".json"]
    samples = [sample for path in paths if path.suffix == ".json" for sample in _read_record(path)]
    runs = [run for run in find_runs(folders).runs if run.finished and run.kind == "pretrain"]
    settings = {_comparable(run): run.name for run in runs}
    if len(settings) > 1:
        raise ValueError(
            f"the runs {' and '.join(list(settings.values())[:2])} differ in data, sequence length "
            "or tokenizer, so their losses have different laws; give the folder of one sweep"
        )
    best: dict[tuple[float, float], Sample] = {}
    for sample in [*samples, *map(_sample, runs)]:
        key = (sample.parameters, sample.tokens)
        if key not in best or sample.loss < best[key].loss:
            best[key] = sample
    return sorted(best.values(), key=lambda each: (each.parameters, each.tokens))


def _read_record(path: Path) -> list[Sample]:
    names = [field.name for field in fields(Sample)]
    try:
        runs = json.loads(path.read_text("utf-8"))["runs"]
        return [Sample(*(run[name] for name in names)) for run in runs]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: is not a record of this program ({error!r})") from None


def _comparable(run: Run) -> str:
    """Return the settings that the runs of a law share; files may lie in different folders."""

    def normalize(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: normalize(each) for key, each in value.items() if key != "store"}
        if isinstance(value, list):
            return [normalize(each) for each in value]
        return Path(value).name if isinstance(value, str) else value

    return json.dumps([normalize(run.settings.get(key)) for key in _COMPARABLE], sort_keys=True)


def _sample(run: Run) -> Sample:
    values = [run.summary[key] for key in ("parameters", "tokens", "bits_per_byte")]
    return Sample(run.name, *values, speed=run.summary["tokens_per_second"])


def speeds(samples: Sequence[Sample]) -> dict[float, float]:
    """Return the median tokens per second by number of parameters."""
    sizes = dict.fromkeys(sample.parameters for sample in samples)
    return {n: median(s.speed for s in samples if s.parameters == n) for n in sizes}


def predict(
    law: Law, resampled: Law, speed: Mapping[float, float], seconds: float, unique: float | None
) -> list[dict[str, Any]]:
    """Predict the loss of each size after `seconds`. unique: tokens of the data, if they repeat.

    Returns a row per size. "best_share": the share of the resampled fits in which it is best.
    """
    rows, all_losses = [], []
    for parameters, rate in sorted(speed.items()):
        tokens = rate * seconds
        counted = effective_tokens(tokens, unique) if unique else tokens
        losses = resampled.at(parameters, counted)
        low, high = numpy.percentile(losses, _INTERVAL)
        all_losses.append(losses)
        rows.append(
            {
                "parameters": parameters,
                "tokens_per_second": rate,
                "tokens": tokens,
                "epochs": tokens / unique if unique else None,
                "bits_per_byte": float(law.at(parameters, counted)),
                "interval": [float(low), float(high)],
            }
        )
    winners = numpy.argmin(all_losses, axis=0)
    for number, row in enumerate(rows):
        row["best_share"] = float((winners == number).mean())
    return rows


def check(law: Law, resampled: Law, final: Run, unique: float | None) -> dict[str, Any]:
    """Compare the loss of a finished run with its prediction."""
    sample = _sample(final)
    tokens = effective_tokens(sample.tokens, unique) if unique else sample.tokens
    predicted = float(law.at(sample.parameters, tokens))
    low, high = numpy.percentile(resampled.at(sample.parameters, tokens), _INTERVAL)
    error = sample.loss / predicted - 1
    return {
        "run": sample.name,
        "parameters": sample.parameters,
        "tokens": sample.tokens,
        "bits_per_byte": sample.loss,
        "predicted": predicted,
        "interval": [float(low), float(high)],
        "error": error,
        "within_tolerance": abs(error) <= _TOLERANCE,
    }


def fitted(law: Law, resampled: Law, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the values of the law with their intervals, and the runs with its values."""
    intervals = {
        name: numpy.percentile(values, _INTERVAL).tolist()
        for name, values in resampled.values().items()
    }
    return {
        "law": {
            name: {"value": float(value), "interval": intervals[name]}
            for name, value in law.values().items()
        },
        "runs": [
            vars(sample) | {"law": float(law.at(sample.parameters, sample.tokens))}
            for sample in samples
        ],
    }


def describe(record: Mapping[str, Any]) -> list[str]:
    """Return the record as Markdown."""
    law, runs = record["law"], record["runs"]
    lines = ["# Scaling law", "", f"`{record['command']}`, {record['date']}.", ""]
    lines += [
        f"Held-out bits per byte L by parameters N and tokens D, fitted to {len(runs)} runs: "
        "L = E + A / N^α + B / D^β. Intervals: 90 %, from fits to resampled runs.",
        "",
    ]
    rows = [
        [name, f"{value['value']:.4g}", _interval(value["interval"], ".4g")]
        for name, value in law.items()
    ]
    lines += [*table(["", "value", "interval"], rows), "", "![Runs and law](law.svg)", ""]
    lines += ["## Runs", ""]
    lines += table(
        ["run", "parameters", "tokens", "bits per byte", "law", "error", "tokens/s"],
        [
            [
                run["name"],
                f"{run['parameters'] / 1e6:.1f}M",
                f"{run['tokens'] / 1e6:.1f}M",
                f"{run['loss']:.4f}",
                f"{run['law']:.4f}",
                f"{run['loss'] / run['law'] - 1:+.2%}",
                f"{run['speed']:,.0f}",
            ]
            for run in runs
        ],
    )
    if rows := record["predictions"]:
        best = min(rows, key=lambda row: row["bits_per_byte"])
        lines += ["", f"## After {record['hours']:g} hours of training", ""]
        lines += [
            f"The best of these sizes: {best['parameters'] / 1e6:.1f}M. These are extrapolations: "
            f"the longest run has {max(run['tokens'] for run in runs) / 1e6:.1f}M tokens.",
            "",
        ]
        lines += table(
            ["parameters", "tokens/s", "tokens", "epochs", "bits per byte", "interval", "best in"],
            [
                [
                    f"{row['parameters'] / 1e6:.1f}M",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['tokens'] / 1e6:,.0f}M",
                    f"{row['epochs']:.1f}" if row["epochs"] else "–",
                    f"{row['bits_per_byte']:.3f}",
                    _interval(row["interval"], ".3f"),
                    f"{row['best_share']:.0%}",
                ]
                for row in rows
            ],
        )
    if final := record["final"]:
        verdict = "within" if final["within_tolerance"] else "outside"
        lines += ["", "## The final run", ""]
        lines += [
            f"{final['run']}: {final['bits_per_byte']:.4f} bits per byte, predicted "
            f"{final['predicted']:.4f} ({_interval(final['interval'], '.3f')}): "
            f"{final['error']:+.2%}, {verdict} the tolerance of {_TOLERANCE:.0%}.",
        ]
    return lines


def _interval(interval: Sequence[float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def plot(law: Law, samples: Sequence[Sample], predictions: Sequence[Mapping[str, Any]]) -> str:
    """Draw the runs and the law by tokens, a curve per size, as an SVG file."""
    lines = []
    for parameters in dict.fromkeys(sample.parameters for sample in samples):
        points = [(s.tokens, s.loss) for s in samples if s.parameters == parameters]
        ends = [r["tokens"] for r in predictions if r["parameters"] == parameters]
        last = max([points[-1][0], *ends])
        xs = numpy.geomspace(points[0][0], last, 40)
        curve = list(zip(xs.tolist(), law.at(parameters, xs).tolist(), strict=True))
        name = f"{parameters / 1e6:.1f}M"
        lines += [Line(name, points, "points"), Line(f"law, {name}", curve, "fit")]
    return as_file(draw(lines, "tokens", "bits per byte", salt="scaling law", logarithmic=True))


def parse_speed(text: str) -> tuple[float, float]:
    """Parse PARAMETERS=TOKENS_PER_SECOND."""
    parameters, _, rate = text.partition("=")
    numbers = float(parameters), float(rate)
    if min(numbers) <= 0:
        raise ValueError
    return numbers


def main() -> None:
    """Fit the law, print the tables, write the record, its page and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, help="sweeps, runs or records")
    parser.add_argument("--hours", type=float, default=8.0, help="time of training to predict for")
    parser.add_argument(
        "--speed",
        type=parse_speed,
        action="append",
        metavar="PARAMETERS=TOKENS_PER_SECOND",
        help="speed of a model on the machine to predict for; default: that of the runs",
    )
    parser.add_argument("--unique", type=float, help="tokens of the data, if they are repeated")
    parser.add_argument("--final", type=Path, help="finished run to compare with its prediction")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.svg")
    args = parser.parse_args()
    try:
        samples = read_samples(args.paths)
        law, resampled = fit_law(samples)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    speed = dict(args.speed or speeds(samples))
    final = read_run(args.final) if args.final else None
    if final and not final.finished:
        parser.exit(1, f"error: {args.final} is not a finished run\n")
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.scaling_law", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        **fitted(law, resampled, samples),
        "hours": args.hours,
        "predictions": predict(law, resampled, speed, 3600 * args.hours, args.unique),
        "final": check(law, resampled, final, args.unique) if final else None,
    }
    page = "\n".join(describe(record)) + "\n"
    print(page)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=1)
        args.out.with_suffix(".json").write_text(text + "\n", "utf-8")
        page = page.replace("(law.svg)", f"({args.out.name}.svg)")
        args.out.with_suffix(".md").write_text(page, "utf-8")
        args.out.with_suffix(".svg").write_text(plot(law, samples, record["predictions"]), "utf-8")


if __name__ == "__main__":
    main()
