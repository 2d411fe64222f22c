"""blocklist: what was asked to be taken out is found however its address is written, and nothing else is."""

import hashlib

import pytest

from dilqur.cleaning.blocklist import Blocklist
from dilqur.common.errors import InputError


@pytest.fixture
def blocklist(tmp_path):
    def make(urls=(), hashes=()):
        (tmp_path / "urls.txt").write_text("\n".join(urls), encoding="utf-8")
        (tmp_path / "hashes.txt").write_text("\n".join(hashes), encoding="utf-8")
        return Blocklist([tmp_path / "urls.txt"], [tmp_path / "hashes.txt"])

    return make


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a",
        "http://www.example.com",
        "https://news.EXAMPLE.com:8080/b?c=d#e",
        "example.com/x",
        "https://user:word@a.b.example.com./",
        f"https://{'şəki'.encode('idna').decode()}.az/",
        "https://www.şəki.az/tarix",
    ],
)
def test_a_host_blocks_all_its_pages_and_subdomains(blocklist, url):
    listed = blocklist(["# taken down", "", "*.example.com", "şəki.az"])
    assert listed.reason(url, "", "") == "blocked_url"


@pytest.mark.parametrize("url", ["https://example.org", "https://myexample.com", "https://example.com.az", "", None, 7])
def test_other_hosts_stay(blocklist, url):
    assert blocklist(["example.com"]).reason(url, "", "") is None


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/xəbər/1",
        "https://www.example.com/xəbər/1/",
        "example.com:443/x%C9%99b%C9%99r/1#son",
        "HTTPS://EXAMPLE.com/xəbər/1",
    ],
)
def test_an_address_blocks_one_page_however_it_is_written(blocklist, url):
    assert blocklist(["https://example.com/xəbər/1"]).reason(url, "", "") == "blocked_url"


@pytest.mark.parametrize(
    "url", ["https://example.com/xəbər/2", "https://example.com/", "https://example.com/Xəbər/1", "http://[::1", "//"]
)
def test_other_pages_stay(blocklist, url):
    assert blocklist(["https://example.com/xəbər/1"]).reason(url, "", "") is None


def test_a_query_makes_another_page(blocklist):
    listed = blocklist(["example.com/?id=1"])
    assert listed.reason("https://example.com?id=1", "", "") == "blocked_url"
    assert listed.reason("https://example.com/?id=2", "", "") is None


def test_an_address_without_a_path_is_a_host(blocklist):
    assert blocklist(["https://www.example.com/"]).reason("https://example.com/a", "", "") == "blocked_url"


def test_a_text_is_blocked_as_it_was_read_and_as_it_was_cleaned(blocklist):
    digest = hashlib.sha256("Bakı".encode()).hexdigest()
    listed = blocklist(hashes=[digest.upper() + "  baki.txt"])
    assert listed.reason(None, "Bakı", "x") == listed.reason(None, "Bakı ", "Bakı") == "blocked_text"
    assert listed.reason(None, "bakı", "bakı") is None


@pytest.mark.parametrize(
    "entry", ["example", "exa mple.com", "http://", "-a.com", "a..b", "https://ex$mple.com/a", "[::1"]
)
def test_a_line_that_is_no_address_is_named(blocklist, entry):
    with pytest.raises(InputError, match=r"urls\.txt:2: .* is neither a host nor an address"):
        blocklist(["example.com", entry])


def test_a_line_that_is_no_hash_is_named(blocklist):
    with pytest.raises(InputError, match=r"hashes\.txt:1: 'abc' is no SHA-256"):
        blocklist(hashes=["abc"])


def test_a_list_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: blocklist: No such file"):
        Blocklist([tmp_path / "none.txt"])
    (tmp_path / "latin.txt").write_bytes(b"example.com\n\xff\n")
    with pytest.raises(InputError, match=r"latin\.txt:2: a blocklist is UTF-8"):
        Blocklist([tmp_path / "latin.txt"])
