"""report.html: curves, pictures, scores and facts of a run in one file that opens anywhere, offline.

No script, no font, no link to anywhere: the page states so in its own content policy. What the run's data set or
export asks to be credited is printed at the top and at the foot.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from condgen.engine.chart import line_chart
from condgen.engine.disk import replace_file
from condgen.engine.log import read_metrics
from condgen.engine.run import RunFolder

_SAMPLE = re.compile(r"step-(\d{8,})-(.+)\.png")
MAX_PICTURE_BYTES = 1_500_000  # larger ones are embedded as JPEG, so that the page stays easy to send
MAX_PICTURE_SIDE = 1600
MAX_CLIP_BYTES = 4_000_000  # a larger GIF stays in samples/
EARLIER = 4

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d7dce1; --page: #ffffff; --card: #f6f8fa;
  --c0: #0b6bcb; --c1: #c4501b; --c2: #1a7f4b; --c3: #8a3ffc; --c4: #b8860b; --c5: #b0306a; --c6: #0e8a8a; --c7: #667; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --line: #353c44; --page: #14171a;
  --card: #1d2226; --c0: #5aa9f7; --c1: #f0925f; --c2: #5fcf93; --c3: #b794ff; --c4: #e0b64a; --c5: #f07fb0;
  --c6: #4fd0d0; --c7: #aab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
.soft { color: var(--soft); } .state { padding: .1rem .55rem; border: 1px solid var(--line); border-radius: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { margin-bottom: .4rem; font-weight: 600; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .grid-line { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.key { margin-right: .9rem; font-size: .85rem; white-space: nowrap; } .key b { font-weight: 400; }
.key i { display: inline-block; width: .8rem; height: .2rem; margin-right: .3rem; vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; } td.long { font: 12px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: 0; padding: .8rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font: 12.5px/1.45 ui-monospace, monospace; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
"""


OWN_CHART = {"grad_norm": "gradient norm", "lr": "learning rate"}


def write_report(run: RunFolder) -> Path:
    """Writes report.html from what the run folder holds now, and returns its path. Parts that are missing are left out.

    Everything is escaped: names, captions and configuration are shown, never interpreted.
    """
    credit = _attribution(run)
    parts = [
        _header(run, credit),
        _curves(run),
        _pictures(run),
        _scores(run),
        _text_section("Configuration", run.path / "config.yaml", is_open=False),
        _text_section("Command", run.path / "command.txt", is_open=True),
        _text_section("Environment", run.path / "environment.json", is_open=False),
        f'<p class="soft">{_escape(credit)}</p>' if credit else "",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(run.name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    path = run.path / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))
    return path


def _header(run: RunFolder, credit: str) -> str:
    status = run.read_status() or {}
    state = str(status.get("state", "no status"))
    facts = [f"step {status['step']}"] if "step" in status else []
    facts += [str(status[name]) for name in ("reason", "time") if status.get(name)]
    lines = [
        f"<h1>{_escape(run.name)}</h1>",
        f'<p><span class="state">{_escape(state)}</span> <span class="soft">{_escape(" · ".join(facts))}</span></p>',
    ]
    return "".join([*lines, f'<p class="soft">{_escape(credit)}</p>' if credit else ""])


def _curves(run: RunFolder) -> str:
    """One chart per group: the part of a metric's name before its last "/", or "metrics".

    Gradient norms and learning rates of all phases have charts of their own: their scales would flatten the losses.
    """
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in read_metrics(run.metrics):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                group, _, short = name.rpartition("/")
                if short in OWN_CHART:
                    group, short = OWN_CHART[short], group or short
                series = groups.setdefault(group or "metrics", {}).setdefault(short, [])
                series.append((float(line["step"]), float(value)))
    figures = [
        f"<figure><figcaption>{_escape(group)}</figcaption>{line_chart(series)}</figure>"
        for group, series in groups.items()
    ]
    return f'<h2>Curves</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _pictures(run: RunFolder) -> str:
    """For every kind of sample: the last picture large, a few earlier ones small."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    folder = run.path / "samples"
    for path in sorted(folder.glob("step-*.png")) if folder.is_dir() else []:
        match = _SAMPLE.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink():
            kinds.setdefault(match[2], []).append((int(match[1]), path))
    shown = []
    for name, found in sorted(kinds.items()):
        found.sort()
        last, earlier = found[-1], _spread(found[:-1], EARLIER)
        small = "".join(_figure(name, step, path) for step, path in earlier)
        shown.append(
            _figure(name, *last) + (f'<div class="grid" style="margin-top:1rem">{small}</div>' if small else "")
        )
    return f"<h2>Samples</h2>{''.join(shown)}" if shown else ""


def _figure(name: str, step: int, path: Path) -> str:
    title = _escape(f"{name}, step {step}")
    source = _data_url(path)
    picture = f'<img alt="{title}" src="{source}">' if source else '<p class="soft">this picture cannot be read</p>'
    moving = _moving(path.with_suffix(".gif"))
    picture += f'<img alt="{title}, moving" src="{moving}" style="margin-top:.6rem">' if moving else ""
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"


def _moving(path: Path) -> str:
    """The clip of that name as an address; "" where there is none that a page can carry."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_CLIP_BYTES:
            return ""
        data = path.read_bytes()
    except OSError:
        return ""
    return f"data:image/gif;base64,{base64.b64encode(data).decode()}" if data.startswith(b"GIF8") else ""


def _data_url(path: Path) -> str:
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if len(data) <= MAX_PICTURE_BYTES:
                image.verify()
                return f"data:image/png;base64,{base64.b64encode(data).decode()}"
            small = image.convert("RGB")
        small.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
        out = io.BytesIO()
        small.save(out, format="JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


def _scores(run: RunFolder) -> str:
    rows = []
    for path in _eval_files(run):
        for score in _find_scores(_read_json(path)):
            numbers = "".join(f'<td class="number">{_number(score.get(k))}</td>' for k in ("value", "floor", "ceiling"))
            better = {True: "higher", False: "lower"}.get(score.get("higher_is_better"), "")  # type: ignore[arg-type]
            rows.append(
                f"<tr><td>{_escape(str(score['name']))}</td>{numbers}<td>{better}</td>"
                f'<td class="long">{_escape(str(score.get("signature", "")))}</td><td>{_escape(path.stem)}</td></tr>'
            )
    if not rows:
        return ""
    head = "".join(f'<th class="number">{name}</th>' for name in ("value", "floor", "ceiling"))
    return (
        '<h2>Scores</h2><p class="soft">floor: the score of a shuffled condition or of the null; ceiling: of real '
        f'data. Compare values only where the signature is the same.</p><div class="scroll"><table><tr><th>score</th>'
        f"{head}<th>better</th><th>signature</th><th>file</th></tr>{''.join(rows)}</table></div>"
    )


def _find_scores(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object with a name and a value, at any depth, in order."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and "value" in value:
            yield value
            return
        for item in value.values():
            yield from _find_scores(item)
    elif isinstance(value, list):
        for item in value:
            yield from _find_scores(item)


def _text_section(title: str, path: Path, is_open: bool) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{title}</summary><pre>{_escape(text)}</pre></details>"


def _attribution(run: RunFolder) -> str:
    """The credit lines in export/config.json and eval/*.json, each once."""
    found: list[str] = []
    for path in [run.path / "export" / "config.json", *_eval_files(run)]:
        found.extend(_find_credits(_read_json(path)))
    return " ".join(dict.fromkeys(found))


def _find_credits(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "attribution" and isinstance(item, str) and item.strip():
                yield item.strip()
            else:
                yield from _find_credits(item)
    elif isinstance(value, list):
        for item in value:
            yield from _find_credits(item)


def _eval_files(run: RunFolder) -> list[Path]:
    folder = run.path / "eval"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–" if value is None else _escape(str(value))
    return f"{value:.4g}"


def _spread(items: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """Up to `count` items at even distances, the first one among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
