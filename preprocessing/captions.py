"""Captions that say nothing of their picture.

They are recognised whole, in any case, after white space and punctuation at both ends are taken off:

* a stock phrase that programs write where nobody wrote one (``STOCK_PHRASES``), also with a number behind it
  (``Image 12``);
* a file's name (``IMG_2041.jpg``, ``photo-1.jpeg``), or what cameras and phones call their files (``DSC00012``);
* an address (``http://…``, ``www.…``);
* no letter of any script at all: digits, punctuation, emoji only.

A caption that merely contains such a thing stays.
"""

import re

STOCK_PHRASES = (
    "image", "images", "img", "photo", "photos", "picture", "pictures", "pic", "thumbnail", "thumb", "icon", "logo",
    "banner", "avatar", "placeholder", "untitled", "no image", "no photo", "no image available", "no photo available",
    "image not available", "image not found", "image coming soon", "image may contain", "default image",
    "featured image", "post thumbnail", "article image", "product image", "product photo", "main image", "hero image",
    "preview", "preview image", "click to enlarge", "click for larger image", "click here", "view larger image",
    "enlarge", "zoom", "loading", "please wait", "alt text", "alt", "description", "no description", "null", "none",
    "undefined", "nan", "n/a", "slide", "slideshow", "gallery", "gallery image", "advertisement", "share", "share this",
    "read more", "home", "next", "previous", "search", "menu", "close", "download",
)  # fmt: skip

_EDGE = r"[\s\p{P}\p{S}]*"
_FILE = r"[^\s]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic)"
_CAMERA = r"(?:img|dsc[nf]?|dscf|pict|mvi|pxl|screenshot|image|photo|p)[-_ ]?\d{2,}(?:[-_]\d+)*"
_ADDRESS = r"(?:https?://|www\.)\S+"

_PHRASE = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in STOCK_PHRASES)

BOILERPLATE = rf"(?i)^{_EDGE}(?:(?:{_PHRASE})(?:\s*#?\d+)?|{_FILE}|{_CAMERA}|{_ADDRESS}){_EDGE}$|^[^\p{{L}}]*$"
"""A pattern in the syntax of Rust's ``regex``, which polars uses."""
