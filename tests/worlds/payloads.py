"""Texts that run a script, or fetch something, on a page that does not hold; most kinds are those of OWASP's and PortSwigger's lists.

Each says that it ran in the page's title, or asks `Beacon`, a server of this machine.
"""

from __future__ import annotations

import json
from typing import Any

from worlds.local_server import Handler, LocalServer

# {c} is a script without spaces and double quotes, {u} an address.
FORMS = """
<script>{c}</script>
</script><script>{c}</script>
<img src=x onerror={c}>
"><img src=x onerror={c}>
'><img src=x onerror={c}>
<svg onload={c}>
"><svg/onload={c}>
<body onload={c}>
<iframe srcdoc="<script>{c}</script>"></iframe>
<iframe src="javascript:{c}"></iframe>
<details open ontoggle={c}>x</details>
<input autofocus onfocus={c}>
<select autofocus onfocus={c}></select>
<textarea autofocus onfocus={c}></textarea>
<a href=x autofocus onfocus={c}>x</a>
<video src=x onerror={c}></video>
<video><source src=x onerror={c}></video>
<audio src=x onerror={c}></audio>
<object data=x onerror={c}></object>
<marquee onstart={c}>x</marquee>
<svg><script>{c}</script></svg>
<svg><set attributeName=x onbegin={c} /></svg>
<svg><animate attributeName=x dur=1s onbegin={c} /></svg>
<script type=module>{c}</script>
</title><script>{c}</script>
</textarea><script>{c}</script>
</style><script>{c}</script>
</pre><script>{c}</script>
</select><img src=x onerror={c}>
</template><img src=x onerror={c}>
]]><script>{c}</script>
--><script>{c}</script>
<!--><script>{c}</script>
<noscript><p title="</noscript><img src=x onerror={c}>"></noscript>
<math><mtext></form><form><mglyph><style></math><img src onerror={c}>
<svg></p><style><a id="</style><img src=x onerror={c}>"></svg>
<p style=animation:a onanimationstart={c}><style>@keyframes a{}</style>
<xmp></xmp><img src=x onerror={c}>
<IMG SRC=x ONERROR={c}>
<img	src=x	onerror={c}>
<script>eval(atob('{b}'))</script>
<script>fetch('{u}')</script>
<script>new Image().src='{u}'</script>
<script>navigator.sendBeacon('{u}')</script>
<script>open('{u}')||location.assign('{u}')</script>
<script src={u}></script>
<script type=module>import '{u}'</script>
<img src={u}>
<img srcset="{u} 1x">
<input type=image src={u}>
<picture><source srcset={u}><img></picture>
<video poster={u}></video>
<video src={u}></video>
<audio src={u} autoplay></audio>
<video src=x><track default kind=captions src={u}></video>
<body background={u}>x</body>
<table background={u}><tr><td>x</table>
<p style="background:url({u})">x</p>
<style>@import '{u}';</style>
<style>body{background:url({u})}</style>
<style>@font-face{font-family:f;src:url({u})}body{font-family:f}</style>x
<link rel=stylesheet href={u}>
<link rel=preload as=image href={u}>
<link rel=prefetch href={u}>
<link rel=modulepreload href={u}>
<link rel=icon href={u}>
<svg><image href={u} /></svg>
<svg><use href={u}#a /></svg>
<iframe src={u}></iframe>
<object data={u}></object>
<embed src={u}>
<meta http-equiv=refresh content="0;url={u}">
<meta http-equiv="Refresh" content="0; {u}">
<meta http-equiv=Content-Security-Policy content="script-src 'unsafe-inline'"><script>{c}</script>
<base href={u}/><img src=x>
<form action={u} id=f></form><script>document.forms[0].submit()</script>
" autofocus tabindex=1 onfocus={c} x="
' autofocus tabindex=1 onfocus={c} x='
javascript:{c}
data:text/html,<script>{c}</script>
&lt;img src=x onerror={c}&gt;
\\u003cimg src=x onerror={c}\\u003e
%3Cimg src=x onerror={c}%3E
{{7*7}}{% raw %}<img src=x onerror={c}>${{c}}
`<img src=x onerror={c}>` **<img src=x onerror={c}>** [x](javascript:{c})
data: "<img src=x onerror={c}>"}],"x":"</script><script>{c}</script>
""".strip().splitlines()


class Beacon(LocalServer):
    """A server that notes who asks it, and shows each payload on a page of its own at /N.

    Attributes:
        asked: Numbers of the payloads that fetched something.
        payloads: All payloads, once it has started.
    """

    def __init__(self) -> None:
        self.asked: set[int] = set()
        self.payloads: list[str] = []
        beacon = self

        class Answer(Handler):
            def do_GET(self) -> None:
                kind, _, number = self.path.strip("/").partition("/")
                number = number.partition("/")[0]
                if kind == "beacon" and number.isdecimal():
                    beacon.asked.add(int(number))
                text = f"<!doctype html><title>-</title>{beacon.payloads[int(kind)]}" if kind.isdecimal() else ""
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

        super().__init__(Answer)

    def __enter__(self) -> str:
        address = super().__enter__()
        for number, form in enumerate(FORMS):
            code = f"top.document.title+='RAN{number};'"
            hidden = json.dumps([ord(c) for c in code]).replace(" ", "")
            words = {
                "{c}": code,
                "{u}": f"{address}/beacon/{number}",
                "eval(atob('{b}'))": f"eval(String.fromCharCode(...{hidden}))",
            }
            for name, word in reversed(words.items()):
                form = form.replace(name, word)
            self.payloads.append(form)
        return address


def spoiled(value: Any, texts: dict[str, str]) -> Any:
    """A JSON document in which every name and every value that is a key of `texts` is its text."""
    if isinstance(value, dict):
        return {texts.get(key, key): spoiled(one, texts) for key, one in value.items()}
    if isinstance(value, list):
        return [spoiled(one, texts) for one in value]
    return texts.get(value, value) if isinstance(value, str) else value
