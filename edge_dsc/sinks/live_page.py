"""The page that ``--serve`` shows: one file, nothing from a network."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256

from edge_dsc.page.style import CSS

_STYLE = (
    CSS
    + """
main, footer { max-width: 76rem; } main { padding-top: 1.25rem; } footer { margin-top: 1.5rem; }
.live { display: grid; grid-template-columns: minmax(0, 3fr) minmax(17rem, 2fr); gap: 1.75rem; align-items: start; }
.live img { display: block; width: 100%; max-height: 82vh; object-fit: contain; background: #000; border-radius: 6px;
  min-height: 12rem; }
.answer { font-size: 1.75rem; line-height: 1.2; font-weight: 650; margin: 0; }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; margin: 1rem 0 1.25rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
#latest { width: 100%; } #latest td:first-child { overflow-wrap: anywhere; }
#latest td:nth-child(n+3), #latest th:nth-child(n+3) { text-align: right; white-space: nowrap; }
.lost { color: var(--s1); font-weight: 600; }
@media (max-width: 52rem) { .live { grid-template-columns: minmax(0, 1fr); } }
"""
)
_SCRIPT = """
const at = (id) => document.getElementById(id);
const ms = (value) => value === null ? "–" : value.toFixed(value < 10 ? 2 : 0) + " ms";
const times = (t) => t === null || t.median_ms === null ? "–" :
  ms(t.median_ms) + " median" + (t.p99_ms === null ? "" : ", " + ms(t.p99_ms) + " p99") + ", " + ms(t.max_ms) + " max";
const cell = (row, text) => { row.insertCell().textContent = text; };
const show = (state) => {
  const newest = state.latest[0];
  at("answer").textContent = !newest ? "waiting for the first picture" :
    newest.error !== null ? "no answer" : newest.label + " " + (100 * newest.probability).toFixed(1) + " %";
  at("engine").textContent = state.engine;
  at("source").textContent = state.source;
  at("rate").textContent = state.per_second === null ? "–" : state.per_second.toFixed(1) + " a second";
  at("count").textContent = state.answers + (state.failed ? ", " + state.failed + " without answer" : "") +
    (state.dropped === null ? "" : ", " + state.dropped + " frames dropped");
  at("latency").textContent = times(state.latency);
  for (const id of ["age-name", "age"]) at(id).hidden = state.age === null;
  at("age").textContent = times(state.age);
  const body = at("rows");
  body.replaceChildren();
  for (const answer of state.latest) {
    const row = body.insertRow();
    cell(row, answer.name);
    cell(row, answer.error === null ? answer.label : answer.error);
    cell(row, answer.probability === null ? "" : (100 * answer.probability).toFixed(1) + " %");
    cell(row, ms(answer.latency_ms));
  }
};
let lost = false;
const ask = async () => {
  try {
    show(await (await fetch("state.json", { cache: "no-store" })).json());
    if (lost) at("picture").src = "stream.mjpg?" + Date.now();
    lost = false;
  } catch (error) { lost = true; }
  at("lost").hidden = !lost;
  setTimeout(ask, 500);
};
ask();
"""
_BODY = """<main>
<div class="live">
<img id="picture" src="stream.mjpg" alt="The newest picture with its answer">
<div>
<p class="answer" id="answer" aria-live="polite">waiting for the first picture</p>
<p class="lost" id="lost" hidden>The run has ended or cannot be reached.</p>
<dl class="facts">
<dt>Rate</dt><dd id="rate">–</dd>
<dt>Latency</dt><dd id="latency">–</dd>
<dt id="age-name" hidden>Age</dt><dd id="age" hidden>–</dd>
<dt>Answers</dt><dd id="count">0</dd>
<dt>Engine</dt><dd id="engine"></dd>
<dt>Source</dt><dd id="source"></dd>
</dl>
<table id="latest"><thead><tr><th>Picture</th><th>Answer</th><th>Probability</th><th>Latency</th></tr></thead>
<tbody id="rows"></tbody></table>
</div>
</div>
</main>
<footer><p>For research and engineering only: not a medical device. Latency is decoding, preprocessing and executing
one picture; age is from the moment a camera's frame was there to its answer.</p></footer>"""


def _source(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src {_source(_SCRIPT)}; "
    f"style-src {_source(_STYLE)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>edge-dsc</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body>{_BODY}<script>{_SCRIPT}</script></body></html>
"""
