"""The style of a report: one light page that reads on a laptop and prints on A4."""

CSS = """
:root { color-scheme: only light; }
* { box-sizing: border-box; }
html { background: #fff; }
body { margin: 0 auto; padding: 28px 32px 60px; max-width: 1144px; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 2px; line-height: 1.25; overflow-wrap: anywhere; }
header + section.only > h2 { margin-top: 0; padding-top: 0; border-top: 0; }
h2 { font-size: 21px; margin: 46px 0 4px; padding-top: 14px; border-top: 2px solid #1a1a1a;
  overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 30px 0 6px; }
h4 { font-size: 14px; margin: 18px 0 4px; }
p, ul { margin: 6px 0 10px; max-width: 82ch; overflow-wrap: anywhere; }
ul { padding-left: 20px; }
a { color: #0072b2; }
.muted, figcaption, small { color: #5c5f66; }
.verdict { border-left: 4px solid #1a1a1a; padding: 2px 0 2px 12px; font-size: 16px; }
.warn { border-left: 4px solid #d55e00; padding: 2px 0 2px 12px; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 10px; margin: 12px 0 16px; }
.tile { border: 1px solid #dcdde1; border-radius: 6px; padding: 10px 12px; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 22px; line-height: 1.2; font-weight: 650; }
.tile span { display: block; font-size: 13px; line-height: 1.35; margin-top: 2px; }
.tile small:empty { display: none; }
.tile small { display: block; font-size: 12px; line-height: 1.35; margin-top: 5px; }
figure { margin: 10px 0 20px; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figcaption { font-size: 13px; max-width: 100ch; margin-top: 4px; }
ul.fine { font-size: 13px; max-width: 110ch; }
.wide { overflow-x: auto; margin: 10px 0 14px; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; min-width: 60%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e7ea; }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid #1a1a1a; font-size: 12px; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 150px; }
.name { white-space: nowrap; }
thead th.over { text-align: center; font-size: 13px; border-bottom: 1px solid #9a9ca1; padding-left: 14px; }
th.n, td.n { text-align: right; padding: 5px 0 5px 14px; }
td.n { white-space: nowrap; }
th.n.first, td.n.first { padding-left: 34px; }
td small, th small { display: block; font-size: 11px; font-weight: 400; }
th .note { color: #a34700; }
tr.floor th, tr.floor td { color: #5c5f66; }
.level { color: #5c5f66; }
.apart small:last-child { color: #1a1a1a; font-weight: 600; }
.swatch { width: 14px; height: 14px; vertical-align: -2px; margin-right: 6px; }
dl { columns: 3; column-gap: 28px; font-size: 12px; line-height: 1.45; margin: 8px 0; }
dl div { break-inside: avoid; display: flex; gap: 8px; justify-content: space-between;
  border-bottom: 1px dotted #dcdde1; }
dt { color: #5c5f66; overflow-wrap: anywhere; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 800px) { .tiles { grid-template-columns: repeat(2, 1fr); } dl { columns: 1; }
  body { padding: 16px; } }
@page { size: A4; margin: 12mm 11mm; }
@media print {
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  h2 { margin-top: 0; padding-top: 0; border-top: 0; }
  section.run { break-before: page; }
  h3, h4 { break-after: avoid; }
  figure, tr, .tile, .verdict, .wide.short { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8pt; }
  thead th { font-size: 7.5pt; }
  th.n, td.n { padding-left: 7px; }
  th.n.first, td.n.first { padding-left: 16px; }
  tbody th { min-width: 96px; }
  td small, th small { font-size: 7pt; }
  .tiles { grid-template-columns: repeat(5, 1fr); gap: 6px; }
  .tile { padding: 6px 8px; } .tile b { font-size: 15pt; } .tile span { font-size: 8.5pt; }
  .tile small { font-size: 7.5pt; }
  dl { font-size: 7.5pt; columns: 3; }
  nav { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
