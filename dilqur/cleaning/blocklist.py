"""Documents that somebody asked to have taken out: by their address, or by what they say.

Lists are text files with one entry a line; empty lines and those that begin with # are skipped.
"""

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dilqur.common.errors import InputError

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEME = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?/+", re.IGNORECASE)  # however many slashes


class Blocklist:
    """The entries of some lists; raises InputError with file and line for one that is none.

    urls: files of hosts (example.com: it and all its subdomains) and addresses (https://example.com/a?b=c: that one,
    whatever its scheme, www., default port, final slash, fragment and percent-encoding). An address without a path is
    a host. hashes: files of SHA-256 in hexadecimal, of the text in UTF-8, as it was read or as it was cleaned; what
    `sha256sum` writes after one is ignored.
    """

    def __init__(self, urls=(), hashes=()):
        self._hosts, self._addresses, self._hashes = set(), set(), set()
        for file, number, entry in _entries(urls):
            host, address = _parts(entry.removeprefix("*."))
            labels = host.split(".")
            if len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)) or any(c.isspace() for c in entry):
                raise InputError(f"{file}:{number}: {entry[:80]!r} is neither a host nor an address; e.g. example.com")
            if address == host:
                self._hosts.add(host)
            else:
                self._addresses.add(address)
        for file, number, entry in _entries(hashes):
            digest = entry.split()[0].lower()
            if not _SHA256.fullmatch(digest):
                raise InputError(f"{file}:{number}: {entry[:80]!r} is no SHA-256: 64 hexadecimal digits")
            self._hashes.add(bytes.fromhex(digest))

    def reason(self, url, raw_text, clean_text):
        """ "blocked_url", "blocked_text" or None. url: the document's address; None, or what is none, blocks nothing."""
        if isinstance(url, str) and (self._hosts or self._addresses) and self._blocks(url):
            return "blocked_url"
        if self._hashes:
            for text in {raw_text, clean_text}:
                if hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() in self._hashes:
                    return "blocked_text"
        return None

    def _blocks(self, url):
        host, address = _parts(url)
        if address in self._addresses:
            return True
        while host:
            if host in self._hosts:
                return True
            host = host.partition(".")[2]
        return False


def _parts(url):
    """(host, address): in lower case and punycode without www.; and with port, path and query after it, if any."""
    try:
        parts = urlsplit("//" + url[match.end() if (match := _SCHEME.match(url)) else 0 :].strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return "", ""
    host = host.removeprefix("www.") if host.count(".") > 1 else host
    path = unquote(parts.path).rstrip("/")
    query = "?" + unquote(parts.query) if parts.query else ""
    if not path and not query:
        return host, host  # a port makes no other host
    return host, host + (f":{port}" if port not in (None, 80, 443) else "") + path + query


def _entries(files):
    """(file, line, entry) of all entries."""
    for file in files:
        try:
            lines = Path(file).read_bytes().split(b"\n")
        except OSError as problem:
            raise InputError(f"{file}: blocklist: {problem.strerror}") from None
        for number, line in enumerate(lines, 1):
            try:
                entry = line.decode("utf-8").strip().removeprefix("\ufeff")
            except UnicodeDecodeError:
                raise InputError(f"{file}:{number}: a blocklist is UTF-8 text with one entry a line") from None
            if entry and not entry.startswith("#"):
                yield file, number, entry
