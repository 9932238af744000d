"""index.html of a comparison: what was measured, then every picture beside its original's. Pictures stay files."""

import html
from collections.abc import Iterator, Mapping, Sequence

from .gallery import AGAIN, ORIGINAL, TERNARY
from .scores import METRICS, Metric
from .statistics import Estimate, Finding

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { padding: .35rem .9rem; border-bottom: 1px solid #d9dde3; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td small, p.note { color: #667080; } td small { display: block; } .interval { white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .4rem 1rem; }
.pictures h3 { grid-column: 1 / -1; font-size: 1rem; margin: 1.5rem 0 0; overflow-wrap: anywhere; }
.pictures b { position: sticky; top: 0; background: white; padding: .3rem 0; }
figure { margin: 0; } figcaption { font-size: .85rem; color: #667080; min-height: 1.3em; }
img { width: 100%; height: auto; display: block; background: #eef0f3; }
"""


def page(
    *,
    names: Mapping[str, str],
    about: Sequence[str],
    size: tuple[int, int],
    findings: Mapping[str, Finding],
    steps: Mapping[str, Sequence[Mapping[str, float | None]]],
    rows: Sequence[Mapping],
) -> str:
    """The page.

    names       what the models are called, by `original`, `ternary` and `again`
    about       sentences on how the pictures were made
    size        of the pictures, (width, height)
    findings    of each metric
    steps       rows of `velocities.by_sigma` of `ternary` and `again`
    rows        of `measure_pictures`
    """
    title = f"{names[TERNARY]} beside {names[ORIGINAL]}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>{" ".join(html.escape(sentence) for sentence in about)}</p>
<h2>In numbers</h2>
{_findings(findings)}
<p class="note">Means over prompts with 95 % bootstrap intervals, paired by prompt and seed. The noise floor is the
original, painted again from the same noise with another implementation of attention: what differs by no more says
nothing about the ternary model.</p>
<h2>Along the original's path</h2>
{_steps(steps)}
<p class="note">Velocity error: squared, relative to the original's. Response: how much another prompt changes the
velocity, relative to the original. Fine detail: energy of high frequencies in the picture that the velocity leads to,
relative to the original's; below 1 the model blurs.</p>
<h2>Pictures</h2>
<div class="pictures">{"".join(f"<b>{html.escape(names[model])}</b>" for model in (ORIGINAL, TERNARY, AGAIN))}
{"".join(_pictures(rows, names, size))}</div>
</html>
"""


def metric(name: str) -> Metric:
    """A metric of ours, or a score of another program."""
    return METRICS.get(name) or Metric(name, "difference from the score of the original's picture")


def shown(value: Estimate, form: str) -> str:
    """0.948 (0.922 to 0.969)"""
    interval = "" if value.low is None else f" ({value.low:{form}} to {value.high:{form}})"
    return f"{value.value:{form}}{interval}"


def _findings(findings: Mapping[str, Finding]) -> str:
    lines = []
    for name, found in findings.items():
        known = metric(name)
        cells = (f'<td class="interval">{shown(v, known.form)}</td>' for v in (found.ternary, found.floor))
        lines.append(
            f"<tr><td>{html.escape(known.title)}<small>{html.escape(known.meaning)}</small></td>{''.join(cells)}"
            f"<td>{found.verdict}</td><td>{found.prompts}</td></tr>"
        )
    head = "<tr><th>metric</th><th>ternary</th><th>noise floor</th><th>the difference is</th><th>prompts</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def _steps(steps: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    def cell(value: float | None, form: str) -> str:
        return f"<td>{'' if value is None else f'{value:{form}}'}</td>"

    lines = []
    for ours, again in zip(steps[TERNARY], steps[AGAIN], strict=True):
        cells = cell(ours["sigma"], ".3f") + cell(ours["error"], ".3g") + cell(again["error"], ".1e")
        cells += cell(ours["response"], ".2f") + cell(ours["detail"], ".2f") + cell(again["detail"], ".2f")
        lines.append(f"<tr>{cells}</tr>")
    head = "<th>sigma</th><th>velocity error</th><th>its noise floor</th><th>response</th>"
    head += "<th>fine detail</th><th>its noise floor</th>"
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _pictures(rows: Sequence[Mapping], names: Mapping[str, str], size: tuple[int, int]) -> Iterator[str]:
    before = None
    for row in rows:
        if row["number"] != before:
            yield f"<h3>{html.escape(row['prompt'])}</h3>"
        before = row["number"]
        yield from (_picture(row, model, names, size) for model in (ORIGINAL, TERNARY, AGAIN))


def _picture(row: Mapping, model: str, names: Mapping[str, str], size: tuple[int, int]) -> str:
    one = row[model]
    if one is None:
        return "<figure></figure>"
    text = f"PSNR {one['psnr']:.1f} dB, SSIM {one['ssim']:.3f}" if "psnr" in one else f"seed {row['seed']}"
    alt = html.escape(f"{names[model]}: {row['prompt']}", quote=True)
    image = f'<img loading="lazy" width="{size[0]}" height="{size[1]}" alt="{alt}" src="{html.escape(one["file"])}">'
    return f'<figure><a href="{html.escape(one["file"])}">{image}</a><figcaption>{text}</figcaption></figure>'
