# SPDX-License-Identifier: Apache-2.0
"""XML that every parser reads, with any class names."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, indent, tostring

# Characters that XML 1.0 cannot hold, not even escaped: control characters, and the surrogates of names on disk that
# are no UTF-8 (section 2.2, production 2).
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
REPLACEMENT = "\ufffd"


def xml_document(root: Element) -> bytes:
    """An element and all below it, indented; what XML cannot hold is replaced by U+FFFD."""
    for element in root.iter():
        element.text = element.text and _FORBIDDEN.sub(REPLACEMENT, element.text)
        for key, value in element.attrib.items():
            element.attrib[key] = _FORBIDDEN.sub(REPLACEMENT, value)
    indent(root, " ")
    return tostring(root, encoding="utf-8") + b"\n"
