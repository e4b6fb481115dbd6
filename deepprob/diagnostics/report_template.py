"""The HTML template of a report: one page with inline style, without scripts or external resources."""

from __future__ import annotations

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ report.verdict }}: {{ report.title }}</title>
<style>
:root {
  --paper: #fbfbf9; --card: #ffffff; --ink: #1d2329; --soft: #5c6670; --line: #e1e3e0;
  --pass: #1a7f4b; --caution: #9a6200; --fail: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #9aa4ad; --line: #31373d;
    --pass: #5cc98b; --caution: #e5b04b; --fail: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
sans-serif; } main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { border-left: 6px solid var(--line); padding-left: 1.1rem; margin-bottom: 2rem; }
header.pass { border-color: var(--pass); } header.caution { border-color: var(--caution); }
header.fail { border-color: var(--fail); }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .9rem; }
header p { margin: .4rem 0 0; color: var(--soft); }
.pass b, b.pass { color: var(--pass); } .caution b, b.caution { color: var(--caution); }
.fail b, b.fail { color: var(--fail); }
.check { display: grid; grid-template-columns: 6.2rem 1fr auto; gap: 0 1rem; padding: .85rem 0;
  border-top: 1px solid var(--line); }
.check:last-of-type { border-bottom: 1px solid var(--line); }
.check h3 { margin: 0; font-size: 1rem; font-weight: 600; }
.check h3::first-letter { text-transform: uppercase; }
.check b { font-size: .82rem; letter-spacing: .04em; text-transform: uppercase; padding-top: .15rem;
} .check .value { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.check .value small { color: var(--soft); display: block; }
.check p { grid-column: 2 / 4; margin: .25rem 0 0; color: var(--soft); }
.check p.next { color: var(--ink); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
gap: 1.25rem; grid-auto-flow: dense; } figure { margin: 0; background: var(--card); border: 1px solid var(--line);
    border-radius: 8px; overflow: hidden; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; aspect-ratio: 56 / 40; object-fit: contain; background: #fff; }
figure.wide img { aspect-ratio: auto; height: auto; }
figcaption { padding: .7rem 1rem .9rem; color: var(--soft); font-size: .92rem; }
figcaption strong { color: var(--ink); display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric:
tabular-nums; } th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid
var(--line); vertical-align: top; } th { font-weight: 600; width: 17rem; } td {
overflow-wrap: anywhere; } footer { margin-top: 2.5rem; color: var(--soft); font-size: .88rem; }
@media (max-width: 36rem) { th { width: 9rem; }
  .check { grid-template-columns: 1fr; } .check p { grid-column: 1; } .check .value { text-align:
  left; }
}
@media print { body { background: #fff; } figure, .check { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header class="{{ report.verdict }}">
<h1><b class="{{ report.verdict }}">{{ report.verdict | capitalize }}</b> · {{ report.title }}</h1>
<p>{{ report.summary }}</p>
</header>

<section aria-label="Checks">
{% for check in report.checks %}
<div class="check {{ check.verdict }}">
  <b>{{ check.verdict }}</b>
  <h3>{{ check.name }}</h3>
  <div class="value">{{ check.measured }}{% if check.threshold is not none %}
  <small>limit {{ number(check.threshold) }}</small>{% endif %}</div>
  <p>{{ check.reading }}</p>
  {% if check.next_step %}<p class="next">Next: {{ check.next_step }}</p>{% endif %}
</div>
{% endfor %}
</section>

{% if pictures %}
<h2>Pictures</h2>
<div class="pictures">
{% for picture in pictures %}
<figure{% if picture.wide %} class="wide"{% endif %}>
  <img src="data:image/png;base64,{{ picture.base64 }}" alt="{{ picture.alt }}">
  <figcaption><strong>{{ picture.title }}</strong>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}

{% for heading, rows in tables %}
{% if rows %}
<h2>{{ heading | capitalize }}</h2>
<div class="scroll"><table>
{% for key, value in rows %}<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% endfor %}

<footer>{{ note }}</footer>
</main>
</body>
</html>
"""
