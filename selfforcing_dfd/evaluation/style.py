"""The report page's style sheet: one column of cards, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #17191d; --soft: #5d6470; --line: #e4e6ea; --ground: #f7f8f9; --card: #ffffff; --band: #c9ced6;
  --near: #e3f3e8; --off1: #fdf3d9; --off2: #fbdfc0; --off3: #f9d3cc;
  --good: #1a7f4b; --bad: #c0392b; --mixed: #b7791f;
  --c0: #6b7280; --c1: #0f766e; --c2: #a16207; --c3: #2563eb; --c4: #d9480f; --c5: #7c3aed; --c6: #be185d;
  --c7: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8eaed; --soft: #9aa1ac; --line: #2c3037; --ground: #121417; --card: #1a1d21; --band: #454b55;
  --near: #16352a; --off1: #3a3318; --off2: #4a3013; --off3: #552420;
  --good: #4ac585; --bad: #f0776a; --mixed: #e0b04f;
  --c0: #a3abb8; --c1: #2dd4bf; --c2: #eab308; --c3: #6aa5ff; --c4: #ff9357; --c5: #b196ff; --c6: #f680b8;
  --c7: #a3d154; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 80px; }
.eyebrow { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 2px 0 20px; font-size: 20px; font-weight: 600; }
h2 { margin: 52px 0 14px; font-size: 18px; font-weight: 600; }
.verdict p { margin: 0 0 14px; padding: 2px 0 2px 16px; border-left: 4px solid var(--band); max-width: 62em;
  font-size: 25px; line-height: 1.3; letter-spacing: -.01em; text-wrap: pretty; }
.verdict b { font-weight: 650; } .verdict span { font-size: 17px; color: var(--soft); letter-spacing: 0; }
.verdict .good { border-color: var(--good); } .verdict .bad { border-color: var(--bad); }
.verdict .mixed { border-color: var(--mixed); }
small { color: var(--soft); font-size: 12px; font-weight: 400; }
.note, .legend { color: var(--soft); font-size: 13px; margin: 10px 0; max-width: 75em; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; }
.key { color: var(--ink); border-radius: 4px; padding: 1px 8px; } .key + .key { margin-left: -10px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); min-width: 200px; }
tbody th small { display: block; line-height: 1.3; }
td { min-width: 106px; border-left: 1px solid var(--line); white-space: nowrap; }
td b { font-weight: 600; } td small { display: block; margin-top: 2px; font-size: 11px; }
.mark { color: var(--soft); margin-left: 3px; }
.near { background: var(--near); } .off1 { background: var(--off1); }
.off2 { background: var(--off2); } .off3 { background: var(--off3); }
.strip { display: block; position: relative; height: 10px; margin-top: 3px; }
.strip i { position: absolute; display: block; }
.strip .band { top: 0; height: 10px; min-width: 3px; background: var(--ink); opacity: .16; border-radius: 2px; }
.strip .bar { top: 4px; height: 2px; background: var(--c); }
.strip .dot { top: 2px; width: 6px; height: 6px; margin-left: -3px; border-radius: 50%; background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.chip { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c); margin-right: 7px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; }
.card { margin: 0; padding: 12px 14px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { margin-bottom: 8px; line-height: 1.35; } figcaption b { font-weight: 600; }
.sheet { display: block; width: 100%; image-rendering: auto; }
.clips { display: grid; grid-template-columns: minmax(120px, 1fr) minmax(0, 540px) minmax(0, 396px); gap: 20px; }
.card + .clips { margin-top: 12px; } .clips small { display: block; margin-top: 4px; }
video { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; background: #595959; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 10.5px; } svg .tiny { font-size: 8.5px; }
.grid { stroke: var(--line); stroke-width: 1; } .reference { stroke: var(--soft); stroke-dasharray: 2 3; }
.line { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.line.dashed { stroke-dasharray: 5 4; } .line.dot { fill: var(--c); stroke: none; }
.prior { stroke: var(--ink); stroke-width: 1.6; fill: none; }
.hue-red { fill: #dc4c4c; } .hue-yellow { fill: #d9b818; } .hue-green { fill: #4caf50; }
.hue-cyan { fill: #22b5c4; } .hue-blue { fill: #4a6cf0; } .hue-magenta { fill: #c850c0; }
pre { overflow-x: auto; padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 13px; }
dt { color: var(--soft); } dd { margin: 0; } summary { cursor: pointer; color: var(--soft); } a { color: var(--c3); }
@media (max-width: 900px) { .clips { grid-template-columns: minmax(0, 1fr); gap: 10px; } video { max-width: 360px; } }
@media (max-width: 640px) { main { padding: 22px 14px 60px; } .verdict p { font-size: 20px; padding-left: 12px; }
  .verdict span { font-size: 15px; } th, td { padding: 6px 9px; } tbody th { min-width: 118px; }
  tbody th small { display: none; } }
"""
