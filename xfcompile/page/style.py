"""How a page looks: light and dark, on a phone and on a wide screen."""

STYLE = """
:root {
  --back: #fbfaf8; --card: #ffffff; --ink: #1d2127; --soft: #626a75; --line: #e3e1dc; --code: #f4f2ee;
  --kernel: #0a8f63; --sdpa: #2166c4; --inductor: #a5730a; --miss: #c03a55;
  --whole: #2f6fd0; --masked: #7eb0f0; --skipped: #e9e7e2; --data: #d59a2a; --data-back: #f6e3bd; --kept: #0b2a55;
  --key: #8a3ea8; --string: #2c7a3f; --comment: #8a8f98; --number: #b0560f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1c2026; --ink: #e6e8eb; --soft: #98a1ad; --line: #2e343c; --code: #15181d;
    --kernel: #35c493; --sdpa: #6ea8f7; --inductor: #dda63a; --miss: #f0778e;
    --whole: #4d8df0; --masked: #2f5796; --skipped: #272c34; --data: #e0aa44; --data-back: #4f3d18; --kept: #d7e6ff;
    --key: #cf8ff0; --string: #8fd19e; --comment: #7b8490; --number: #eba069;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 24px 64px; }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
a { color: inherit; }
h1 { font-size: 20px; margin: 44px 0 14px; font-weight: 650; letter-spacing: -.01em; }
.title h1 { font-size: 34px; line-height: 1.15; margin: 0; overflow-wrap: anywhere; }
.over { margin: 0 0 4px; color: var(--soft); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
.summary { margin: 10px 0 0; color: var(--soft); }
h2, h3 { margin: 0; font-size: 17px; font-weight: 650; }
h3 { font-size: 15px; overflow-wrap: anywhere; min-width: 0; }
.strip { margin: 28px 0; padding: 16px 18px; background: var(--card); border-radius: 12px;
  border: 1px solid var(--line); display: grid; gap: 12px; }
.strip-row { display: grid; grid-template-columns: 210px 1fr; gap: 6px 18px; align-items: center; }
.family b { display: block; font-weight: 600; } .family span { color: var(--soft); font-size: 13px; }
.cells { display: flex; flex-wrap: wrap; gap: 4px; }
.cell { width: 20px; height: 24px; border-radius: 4px; background: currentColor; opacity: .9; }
.cell:hover { opacity: 1; outline: 2px solid var(--ink); outline-offset: 1px; }
.cell.miss { background: none; border: 2px dashed currentColor; }
.kernel { --hue: var(--kernel); } .sdpa { --hue: var(--sdpa); }
.inductor { --hue: var(--inductor); } .miss { --hue: var(--miss); }
.cell { color: var(--hue); }
.chip { color: var(--hue); border: 1.5px solid currentColor; border-radius: 99px; padding: 0 10px; font-size: 13px;
  font-weight: 600; white-space: nowrap; }
.card { margin: 18px 0; padding: 18px 20px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  border-left: 4px solid var(--hue); scroll-margin-top: 12px; }
.card header { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; }
.times { color: var(--soft); font-weight: 500; margin-right: 7px; }
.where { color: var(--soft); overflow-wrap: anywhere; min-width: 0; }
.body { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 8px 28px; align-items: start; }
.formulas { min-width: 0; }
.equation { overflow-x: auto; overflow-y: hidden; padding: 7px 0; }
math { font-size: 1.2em; font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", "TeX Gyre Termes Math",
  "STIX Math", math; }
math[display=block] { margin: 0; width: max-content; text-align: left; }
.aligned mtd { padding: .18em .12em; } .aligned mtd:first-child { text-align: right; }
.aligned mtd:last-child, .cases mtd { text-align: left; } .cases mtd { padding: .1em .4em; }
.plain { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { margin: 10px 0 0; font-size: 13.5px; }
dl > div { display: grid; grid-template-columns: 140px minmax(0, 1fr); gap: 0 12px; padding: 2px 0; }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.glossary dt { font-family: "STIX Two Text", "Cambria", "TeX Gyre Termes", Georgia, serif; color: var(--ink); }
.glossary > div { grid-template-columns: minmax(140px, max-content) minmax(0, 1fr); }
figure.mask { margin: 8px 0 0; width: 232px; }
.axis { color: var(--soft); font-size: 12px; margin-bottom: 3px; }
.tiles { display: block; width: 100%; max-height: 300px; border-radius: 3px; }
.tiles .whole { fill: var(--whole); } .tiles .masked { fill: var(--masked); } .tiles .skipped { fill: var(--skipped); }
.tiles .kept { fill: var(--kept); opacity: .22; pointer-events: none; }
.data-back { fill: var(--data-back); } .data-line { fill: var(--data); }
.legend ul { list-style: none; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: 1px 14px; font-size: 13px; }
.legend li { white-space: nowrap; }
.legend p { margin: 4px 0 0; color: var(--soft); font-size: 12.5px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.swatch.whole { background: var(--whole); } .swatch.masked { background: var(--masked); }
.swatch.skipped { background: var(--skipped); }
.swatch.data { background: repeating-linear-gradient(45deg, var(--data) 0 2px, var(--data-back) 2px 5px); }
.route { margin: 14px 0 0; }
.trail { list-style: none; margin: 10px 0 0; padding: 0; color: var(--soft); font-size: 13px; display: flex;
  flex-wrap: wrap; gap: 0 8px; }
.trail li + li::before { content: "› "; }
pre { margin: 6px 0 0; padding: 10px 12px; background: var(--code); border-radius: 8px; overflow-x: auto; }
.source .line { color: var(--comment); user-select: none; }
.source code > span { display: block; height: 1.5em; white-space: pre; opacity: .62; }
.source .here { opacity: 1; font-weight: 600; }
.source code > span:only-child { opacity: 1; }
details { margin-top: 10px; } details pre { max-height: 70vh; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
summary code, summary span { color: var(--soft); font-weight: 400; margin-left: 10px; }
.same { font-size: 14px; margin: 10px 0 0; }
.k { color: var(--key); } .s { color: var(--string); } .c { color: var(--comment); font-style: italic; }
.n { color: var(--number); } .d { color: var(--key); }
.left, .failures { padding-left: 20px; } .left li, .failures li { margin: 3px 0; overflow-wrap: anywhere; }
.failures { color: var(--miss); }
.calls { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 6px; }
.calls li { border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: 2px 9px;
  font-size: 13px; }
.calls b { color: var(--soft); font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
.ok { color: var(--kernel); } .wrong { color: var(--miss); font-weight: 700; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 700px) {
  main { padding: 24px 14px 48px; } .title h1 { font-size: 26px; }
  .body, .strip-row { grid-template-columns: minmax(0, 1fr); } .card { padding: 14px; }
  figure.mask { width: min(100%, 300px); } math { font-size: 1.1em; }
  dl > div { grid-template-columns: 92px minmax(0, 1fr); }
  .glossary > div { grid-template-columns: minmax(0, 1fr); padding: 4px 0; } .glossary dd { color: var(--soft); }
}
@media print { details { display: none; } .card { break-inside: avoid; } }
"""
