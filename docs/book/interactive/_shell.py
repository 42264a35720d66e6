"""What interactive pages share: one self-contained document that may fetch nothing, and a style that grey prints keep apart."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str, data: Any, script: str) -> str:
    """A page: `body` is complete without scripts; `script` finds `data` as the constant DATA and elements by $(id)."""
    given = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{body}
</main>
<script>
"use strict";
const DATA = {given};
const $ = (id) => document.getElementById(id);
{script}
</script>
</body>
</html>
"""
