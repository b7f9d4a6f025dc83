"""Figures as HTML that needs nothing else: no kernel, no library, no network."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from detcore.explore.controls import Control
from detcore.explore.look import own_ids

__all__ = ["moving", "still"]

_REM_PER_INCH = 7.5  # 4.8 inches fill 36rem, so letters have one size in all figures of a page

_CSS = (
    ".dcx{margin:1.25rem 0;color:inherit;break-inside:avoid}"
    ".dcx figcaption{font-weight:600;margin:0 0 .5rem}"
    ".dcx-stage{margin:0 auto}.dcx-stage svg,.dcx-stage img{display:block;width:100%;height:auto}"
    ".dcx-stage.dcx-webp{background:#fff}"
    ".dcx-bar{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;max-width:36rem;margin:0 auto .5rem}"
    ".dcx-bar label{display:flex;gap:.6rem;align-items:center;flex:1 1 14rem;min-height:2.5rem;margin:0}"
    ".dcx-bar input{flex:1;min-width:6rem;margin:0;height:2rem}"
    ".dcx-bar output{min-width:3em;text-align:right;font-variant-numeric:tabular-nums}"
)

_JS = """(()=>{const r=document.querySelector('[id="%KEY%"]:not([data-ready])');if(!r)return;
const d=JSON.parse(r.querySelector('.dcx-data').textContent);if(d.gz&&!window.DecompressionStream)return;
const s=r.querySelector('.dcx-stage'),cs=[...r.querySelectorAll('[data-texts]')];let p;
const load=()=>p??=d.gz?new Response(new Blob([Uint8Array.from(atob(d.gz),c=>c.charCodeAt(0))]).stream()
.pipeThrough(new DecompressionStream('gzip'))).json().then(q=>q.frames.map(f=>f.map(i=>q.tags[i]).join('')))
:Promise.resolve(d.frames);
const show=async()=>{for(const c of cs){const t=JSON.parse(c.dataset.texts)[c.value];
if(c.type==='range'){c.setAttribute('aria-valuetext',t);c.nextElementSibling.textContent=t}}
const f=await load(),i=cs.reduce((a,c)=>a*JSON.parse(c.dataset.texts).length+ +c.value,0);
s.innerHTML=d.fmt==='webp'?`<img alt="" src="data:image/webp;base64,${f[i]}">`:f[i];
s.setAttribute('aria-label',d.alt.length>1?d.alt[i]:d.alt[0]);r.dataset.frame=i};
for(const c of cs){c.disabled=false;c.addEventListener('input',show)}r.dataset.ready=1;
if(cs.some(c=>c.value!==c.dataset.start))show()})()"""


def still(drawn: str, fmt: str, alt: str, width: float) -> str:
    """One picture that stands still.

    Args:
        drawn: SVG text, or a WebP picture in base64.
        fmt: ``"svg"`` or ``"webp"``.
        alt: what is to be seen.
        width: of the figure, in inches.

    Returns:
        An HTML fragment.

    Example:
        >>> 'aria-label="A dot."' in still("<svg></svg>", "svg", "A dot.", 4.8)
        True
    """
    if fmt == "svg":
        drawn = own_ids(drawn, _key(drawn))
    return f'<style>{_CSS}</style><figure class="dcx">{_stage(_frame(drawn, fmt), alt, width, fmt)}</figure>'


def moving(
    frames: Sequence[str],
    fmt: str,
    alts: Sequence[str],
    width: float,
    controls: Mapping[str, Control],
    *,
    title: str | None = None,
    pack: bool = True,
) -> str:
    """Pictures under controls, with the script that switches between them.

    Args:
        frames: SVG texts, or WebP pictures in base64, for every combination of stops, the last control fastest.
        fmt: ``"svg"`` or ``"webp"``.
        alts: what is to be seen, one text a frame.
        width: of the figures, in inches.
        controls: by name, in the order that the combinations were made in.
        title: a line above the controls.
        pack: compress the frames.

    Returns:
        An HTML fragment that shows the start frame also where no script runs.

    Example:
        >>> from detcore.explore import choice
        >>> page = moving(["<svg>1</svg>", "<svg>2</svg>"], "svg", ["One.", "Two."], 4.8, {"n": choice(1, 2)})
        >>> page.count("<option"), "<svg>1</svg>" in page, "<svg>2</svg>" in page
        (2, True, False)
    """
    key = _key(title, list(alts), [(name, c.texts) for name, c in controls.items()], list(frames))
    if fmt == "svg":
        frames = [own_ids(frame, key) for frame in frames]
    start = 0
    for control in controls.values():
        start = start * len(control.values) + control.start
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    bar = "".join(_control(name, control) for name, control in controls.items())
    return (
        f'<style>{_CSS}</style><figure class="dcx" id="{key}" data-frames="{len(frames)}" data-frame="{start}">'
        f'{caption}<div class="dcx-bar">{bar}</div>{_stage(_frame(frames[start], fmt), alts[start], width, fmt)}'
        f'<script type="application/json" class="dcx-data">{_data(frames, fmt, alts, pack)}</script>'
        f"<script>{_JS.replace('%KEY%', key)}</script></figure>"
    )


def _data(frames: Sequence[str], fmt: str, alts: Sequence[str], pack: bool) -> str:
    data: dict[str, Any] = {"fmt": fmt, "alt": list(alts) if len(set(alts)) > 1 else [alts[0]]}
    if pack:
        # Frames of one figure share most of their tags; gzip alone looks back 32 kB only, less than a frame.
        places: dict[str, int] = {}
        rows = [[places.setdefault(tag, len(places)) for tag in re.split("(?<=>)", frame)] for frame in frames]
        raw = json.dumps({"tags": list(places), "frames": rows}, separators=(",", ":")).encode()
        data["gz"] = base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()
    else:
        data["frames"] = list(frames)
    # no "<" in the data, so that nothing in it can end the script element
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _key(*parts: Any) -> str:
    """The same id for the same figure in every build, another for every other figure."""
    return "dcx-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def _frame(drawn: str, fmt: str) -> str:
    return drawn if fmt == "svg" else f'<img alt="" src="data:image/webp;base64,{drawn}">'


def _stage(frame: str, alt: str, width: float, fmt: str) -> str:
    return (
        f'<div class="dcx-stage dcx-{fmt}" role="img" aria-label="{escape(alt)}" '
        f'style="max-width:{width * _REM_PER_INCH:g}rem">{frame}</div>'
    )


def _control(name: str, control: Control) -> str:
    texts = escape(json.dumps(control.texts, ensure_ascii=False))
    label = escape(control.label or name)
    # disabled until the script runs: without it nothing pretends to be alive
    common = f'disabled autocomplete="off" data-texts="{texts}" data-start="{control.start}"'
    if control.kind == "choice":
        options = "".join(
            f'<option value="{i}"{" selected" if i == control.start else ""}>{escape(text)}</option>'
            for i, text in enumerate(control.texts)
        )
        return f"<label><span>{label}</span><select {common}>{options}</select></label>"
    shown = escape(control.texts[control.start])
    return (
        f'<label><span>{label}</span><input type="range" min="0" max="{len(control.values) - 1}" step="1" '
        f'value="{control.start}" aria-valuetext="{shown}" {common}><output>{shown}</output></label>'
    )
