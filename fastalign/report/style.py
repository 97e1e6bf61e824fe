"""The style sheet of the page, and the colours that the page and the plots share.

The colours are Okabe and Ito's set for every kind of colour vision, darkened where thin lines and
small labels need contrast on white.
"""

BLUE = "#0067A5"  # proxy: what is maximised
AMBER = "#C26A00"  # gold: what is wanted
GREEN = "#007A5A"  # held out
PURPLE = "#8A4F8D"  # KL
RED = "#B3391F"
SKY = "#5AA9DC"
INK = "#1C2026"
MUTED = "#66707C"
RULE = "#DFE3E8"

_ROOT = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --rule: {RULE}; --accent: {BLUE}; --warn: {RED};
  --sans: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Ubuntu, Cantarell, "Noto Sans",
    "Liberation Sans", Arial, system-ui, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono",
    "DejaVu Sans Mono",
    monospace; }}
"""

STYLE = (
    _ROOT
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 44px 36px 72px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.kicker { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 24px; color:
  var(--muted);
  font-size: 13px; border-bottom: 1px solid var(--rule); padding-bottom: 10px;
  margin-bottom: 26px; }
.kicker b { color: var(--ink); font-weight: 650; letter-spacing: .01em; }
h1 { font-size: 25px; line-height: 1.36; font-weight: 600; letter-spacing: -.011em; margin: 0 0 8px;
  max-width: 40em; text-wrap: pretty; }
h2 { font-size: 19px; font-weight: 650; letter-spacing: -.005em; margin: 52px 0 4px; padding-top:
  14px;
  border-top: 1px solid var(--rule); }
h3 { font-size: 15px; font-weight: 650; margin: 28px 0 2px; }
p { margin: 6px 0 12px; max-width: 46em; }
.lede { max-width: 66em; }
.lede, figcaption { color: var(--muted); font-size: 13.5px; }
.second { font-size: 17px; line-height: 1.5; max-width: 44em; }
.banner { border-left: 3px solid var(--warn); background: #FBF4F2; padding: 10px 14px; margin: 0 0
  20px;
  max-width: none; }
.notes { color: var(--muted); font-size: 13.5px; margin: 14px 0 0; padding-left: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(134px, 1fr)); margin: 28px
  0 8px;
  border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
.figures div { padding: 12px 12px 11px 14px; border-right: 1px solid var(--rule); margin-right:
  -1px; }
.figures dt { color: var(--muted); font-size: 12.5px; }
.figures dd { margin: 1px 0 0; font-size: 18px; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400;
  letter-spacing: 0;
  white-space: normal; line-height: 1.35; }
nav { display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 13.5px; margin: 18px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px;
  margin: 12px 0 6px; }
th { font-weight: 600; text-align: left; color: var(--muted); font-size: 12.5px; white-space:
  nowrap; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
thead th { border-bottom: 1px solid var(--ink); }
td.n, th.n { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
td small { display: block; color: var(--muted); font-size: 12.5px; line-height: 1.35; }
td.se { color: var(--muted); padding-left: 0; text-align: left; white-space: nowrap; }
td.main, th.main { padding-right: 5px; }
tr.lead td { font-weight: 600; }
tr.lead td small, tr.lead td.se, tr.lead td.unit { font-weight: 400; }
table.numbers td:first-child { min-width: 210px; }
td.unit, td.quiet { color: var(--muted); white-space: nowrap; }
td.verdict { text-align: right; }
td.look { color: var(--warn); font-weight: 600; white-space: nowrap; }
figure { margin: 18px 0 26px; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: var(--sans) !important; font-variant-numeric: tabular-nums; }
figcaption { margin-top: 4px; max-width: 66em; }
figcaption b { color: var(--ink); font-weight: 600; }
.missing { border: 1px dashed #C9CFD6; border-radius: 6px; padding: 12px 16px; color: var(--muted);
  font-size: 13.5px; margin: 16px 0; max-width: none; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px; }
.sample { margin: 18px 0 0; border: 1px solid var(--rule); border-radius: 6px; break-inside: avoid;
  }
.sample .prompt { padding: 11px 16px; border-bottom: 1px solid var(--rule); background: #F7F8FA; }
.sample .sides { display: grid; grid-template-columns: 1fr 1fr; }
.sample .sides > div { padding: 11px 16px 13px; min-width: 0; }
.sample .sides > div + div { border-left: 1px solid var(--rule); }
.sample .who { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px;
  font-size: 12.5px;
  color: var(--muted); margin-bottom: 5px; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 14px/1.5
  var(--sans); }
.empty { color: var(--muted); font-style: italic; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 5px 22px; font-size: 14px;
  margin: 12px 0;
  font-variant-numeric: tabular-nums; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: 12.5px/1.55 var(--mono); }
pre { background: #F7F8FA; border: 1px solid var(--rule); border-radius: 6px; padding: 12px 16px;
  margin: 10px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; margin: 10px 0; }
footer { margin-top: 56px; border-top: 1px solid var(--rule); padding-top: 12px; color:
  var(--muted);
  font-size: 13px; }
@media (max-width: 820px) { main { padding: 28px 18px 48px; } .pair, .sample .sides {
  grid-template-columns: 1fr; }
  .sample .sides > div + div { border-left: 0; border-top: 1px solid var(--rule); } }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav, summary {
  display: none; }
  h2, h3 { break-after: avoid; } @page { margin: 16mm 14mm; } }
"""
)
