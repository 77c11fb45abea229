"""The one style sheet of our HTML pages: light and dark, phone and print, nothing from a network."""

from __future__ import annotations

# Series colours keep apart for the common kinds of colour blindness and are told apart by dash as well;
# after Okabe and Ito, Color Universal Design (2008), darkened on white and lightened on black for contrast.
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1e23; --soft: #5b626d; --line: #d9dde3;
  --faint: #f4f6f8; --band: #e6eaf0; --s0: #0063a6; --s1: #c24a00; --s2: #007a5a; --s3: #964a80;
  --s4: #8a6600; --s5: #565b63; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7e9ec; --soft: #a2aab5;
  --line: #343a43; --faint: #1c2026; --band: #2a3039; --s0: #62b3f2; --s1: #ff9c5c; --s2: #40c9a0;
  --s3: #e39cc8; --s4: #e2bd4c; --s5: #b4bac3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
main { padding-top: 2.5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 2.75rem 0 .75rem; }
h1, h2, p, li, figcaption { overflow-wrap: anywhere; }
th, td { overflow-wrap: break-word; }
p { max-width: 42rem; margin: .6rem 0; }
.caption { color: var(--soft); font-size: .875rem; margin: 1.25rem 0 0; }
.scroll { overflow-x: auto; margin: .25rem 0 .5rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; color: var(--soft); border-bottom-color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 600; }
.numeric :is(th, td):not(:first-child) { text-align: right; white-space: nowrap; }
.notes { margin: .4rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .875rem; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; max-width: 37rem; height: auto; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .5rem; max-width: 42rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .25rem 0 .5rem; padding: 0;
  list-style: none; font-size: .875rem; font-variant-numeric: tabular-nums; }
.legend svg { display: inline-block; width: 30px; max-width: none; height: 10px; margin-right: .5rem; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.name { fill: var(--ink); font-weight: 600; }
svg text.value { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.band { fill: var(--band); }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.series.roof { stroke: var(--soft); }
.fill.c0, .dot.c0 { fill: var(--s0); } .fill.c1, .dot.c1 { fill: var(--s1); } .fill.c2, .dot.c2 { fill: var(--s2); }
.fill.c3, .dot.c3 { fill: var(--s3); } .fill.c4, .dot.c4 { fill: var(--s4); } .fill.c5, .dot.c5 { fill: var(--s5); }
.fill { stroke: none !important; }
.throttled { fill: var(--s1); opacity: .25; }
.mark { fill: var(--s0); }
.bar { stroke: var(--s0); stroke-width: 2.5; }
.c0 { stroke: var(--s0); } .c1 { stroke: var(--s1); } .c2 { stroke: var(--s2); }
.c3 { stroke: var(--s3); } .c4 { stroke: var(--s4); } .c5 { stroke: var(--s5); }
footer { color: var(--soft); font-size: .875rem; padding-top: 1rem; padding-bottom: 2.5rem; margin-top: 3rem; }
footer p { border-top: 1px solid var(--line); padding-top: 1rem; max-width: none; }
@media (max-width: 34rem) { body { font-size: 15px; } main { padding-top: 1.5rem; } h1 { font-size: 1.45rem; }
  main, footer { padding-left: 1rem; padding-right: 1rem; } svg text { font-size: 14px; }
  .scroll { margin-right: -1rem; padding-right: 1rem; }
  .scroll .numeric :is(th, td):first-child { position: sticky; left: 0; background: var(--paper);
    white-space: normal; min-width: 6rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb;
  --band: #e6e6e6; --s0: #0063a6; --s1: #c24a00; --s2: #007a5a; --s3: #964a80; --s4: #8a6600; --s5: #565b63; }
  body { font-size: 10pt; } main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  main { padding-top: 0; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .2rem .4rem; } thead th { white-space: normal !important; }
  figure, tr { break-inside: avoid; } h2, .caption { break-after: avoid; } figure svg { max-width: 15cm; }
  @page { margin: 1.6cm; } }
"""
