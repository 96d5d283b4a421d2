"""The report's style sheet: light and dark, wide screens and phones."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--soft:#5b6675;--line:#e3e7ec;--easy:#009e73;--mid:#0072b2;--hard:#d55e00;
--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#b0508f;--c5:#d18b00;--c6:#3a9fd8;
--c7:#7a4b1f;--c8:#6a51c8;--c9:#808500;--c10:#d1187f;--c11:#75808d;
--s1:#d8ecd9;--s2:#a9dcc4;--s3:#6cc5c0;--s4:#3aa3c2;--s5:#2f78b5;--s6:#3b4a9b;--s7:#472a73;--s8:#2b0b36;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#11151b;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa6b5;--line:#2c3440;
--easy:#35c99b;--mid:#56a8e8;--hard:#ff8a47;--c1:#56a8e8;--c2:#ff8a47;--c3:#35c99b;--c4:#e08cc0;--c5:#f0b53c;--c6:#8fd0f5;
--c7:#c99a6b;--c8:#a898ff;--c9:#c9cf4a;--c10:#ff6ab8;--c11:#a7b1bd;
--s1:#2b2f57;--s2:#36498b;--s3:#2f70ad;--s4:#2f99b5;--s5:#45bca5;--s6:#8fd67e;--s7:#dde26a;--s8:#fff7c2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1480px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:13px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin:34px 0 10px;font-weight:600}
h3{font-size:15px;margin:0;display:flex;justify-content:space-between;gap:8px;font-weight:600;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:6px;margin:0;padding:0;list-style:none;font-size:13px;color:var(--soft)}
.facts li{border:1px solid var(--line);background:var(--card);border-radius:99px;padding:2px 10px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(178px,1fr));gap:12px;margin:20px 0 0}
.tile,figure,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}.tile dt,.tile small{color:var(--soft);font-size:13px}
.tile dd{margin:2px 0 0;font-size:19px;font-weight:600;line-height:1.4;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile small{display:block;font-weight:400;white-space:normal}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px}
figure{margin:0;padding:14px 14px 8px;display:flex;flex-direction:column;min-width:0}
figcaption{flex:1}figcaption p{margin:2px 0 6px;color:var(--soft);font-size:13px}
.at{color:var(--soft);font-weight:400;font-size:13px;white-space:nowrap}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-bottom:6px}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;background:currentColor;margin-right:5px}
.key{overflow-wrap:anywhere}.key b{font-weight:600;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block;overflow:visible;touch-action:pan-y;font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg path{fill:none;stroke-linecap:round;stroke-linejoin:round}
.tick,.axis,.none{fill:var(--soft)}.tick{font-variant-numeric:tabular-nums}.y,.end{text-anchor:end}.x,.none{text-anchor:middle}
.rule{stroke:var(--line)}.base,.notch{stroke:var(--soft);stroke-width:.8}
.raw,.line,.points,.dot{stroke:currentColor}.line.d1{stroke-dasharray:7 4}.line.d2{stroke-dasharray:2 3}
svg .line.d1,svg .line.d2{stroke-linecap:butt}.raw{stroke-width:1;opacity:.3}.line{stroke-width:2}.points{stroke-width:6}
svg .band,svg .layer{fill:currentColor}.band{opacity:.16}.layer{opacity:.72}[class^="layer s"]{opacity:.92}
.cursor{stroke:var(--soft);stroke-dasharray:3 3}.dot{stroke-width:7}.cursor,.dot{visibility:hidden}
.live .cursor,.live .dot.on{visibility:visible}
.easy{color:var(--easy)}.mid{color:var(--mid)}.hard{color:var(--hard)}.ink{color:var(--ink)}.c1{color:var(--c1)}
.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
.c7{color:var(--c7)}.c8{color:var(--c8)}.c9{color:var(--c9)}.c10{color:var(--c10)}.c11{color:var(--c11)}
.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}
.s7{color:var(--s7)}.s8{color:var(--s8)}
details{margin-top:12px;padding:10px 16px}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:480px){main{padding:18px 12px 32px}.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:9px 11px}
.tile dd{font-size:17px}}
footer{margin-top:26px;color:var(--soft);font-size:13px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 14px;text-align:left;border-top:1px solid var(--line);vertical-align:top;font-weight:400}
thead th{border-top:0;font-weight:600;min-width:96px;max-width:320px;overflow-wrap:anywhere}
tbody th{color:var(--soft);white-space:nowrap;background:var(--card)}
td{overflow-wrap:anywhere;max-width:320px}td small,th small{display:block;color:var(--soft);font-size:12.5px}
th i{display:inline-block;width:10px;height:10px;border-radius:3px;background:currentColor;margin-right:6px}
i.d0,i.d1,i.d2{width:24px!important;height:4px!important;border-radius:0!important;vertical-align:middle}
i.d1{background:repeating-linear-gradient(90deg,currentColor 0 6px,#0000 6px 9px)!important}
i.d2{background:repeating-linear-gradient(90deg,currentColor 0 3px,#0000 3px 6px)!important}
.range{display:block;position:relative;height:6px;width:120px;max-width:100%;margin:3px 0 2px;border-radius:3px;background:var(--line)}
.range i{position:absolute;top:0;height:6px;min-width:2px;border-radius:3px;background:var(--c1);opacity:.45}
.range b{position:absolute;top:-2px;width:3px;height:10px;margin-left:-1.5px;border-radius:2px;background:var(--c1)}
details .wide{margin-top:8px;border:0}.lead{color:var(--soft);font-size:13px;margin:0 0 10px}
h4{font-size:14px;margin:16px 0 4px;font-weight:600;overflow-wrap:anywhere}
.badge{display:inline-block;font-style:normal;font-size:12.5px;font-weight:600;border:1.5px solid currentColor;border-radius:99px;padding:0 9px}
.group{margin-top:8px;padding:9px 14px}.group summary{font-weight:400;overflow-wrap:anywhere}
.group summary b{font-weight:600;margin:0 6px}.group summary span{color:var(--soft);font-size:13px}
.marks{display:inline-flex;flex-wrap:wrap;gap:2px;margin-left:8px;vertical-align:middle}
.marks i{width:9px;height:9px;border-radius:2px;background:currentColor}.marks i.wrong{background:none;border:1.5px solid currentColor}
.said{margin:8px 0 0;padding:4px 0 4px 10px;border-left:3px solid currentColor}
.said p{margin:0;color:var(--soft);font-size:12.5px}.said p b{color:var(--ink)}
.said pre,.asked pre{margin:2px 0 0;color:var(--ink);white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
.asked{margin-top:8px}.asked p{margin:0;color:var(--soft);font-size:12.5px}.right{color:var(--easy)}.wrong{color:var(--hard)}
@media (max-width:480px){th,td{padding:6px 9px}td{min-width:112px}thead th i{display:block;margin:2px 0 4px}
tbody th{white-space:normal;min-width:108px;max-width:128px;overflow-wrap:anywhere;position:sticky;left:0;border-right:1px solid var(--line)}}
@media (max-width:480px){svg{font-size:14px}}@media (max-width:413px){svg{font-size:16px}}
@media (max-width:359px){svg{font-size:18.5px}}
"""
