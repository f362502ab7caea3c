"""Headers that cross the proxy."""

from multidict import CIMultiDict

from swapserve.router.headers import to_client, to_engine


def test_headers_named_by_any_connection_header_stay_behind() -> None:
    given = CIMultiDict(
        [
            ("Connection", "close"),
            ("connection", "X-A , x-b"),
            ("X-A", "1"),
            ("X-B", "2"),
            ("C", "3"),
        ]
    )
    assert set(to_client(given)) == {"C"}


def test_an_engine_sees_json_uncompressed_and_our_own_headers() -> None:
    given = CIMultiDict({"Accept-Encoding": "gzip", "Authorization": "Bearer client", "Host": "x"})
    assert dict(to_engine(given, {"Authorization": "Bearer ours"})) == {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "Authorization": "Bearer ours",
    }


def test_the_type_and_length_of_an_answer_are_kept() -> None:
    given = CIMultiDict(
        {
            "Content-Type": "application/json",
            "Content-Length": "2",
            "Server": "e",
            "Set-Cookie": "a",
        }
    )
    assert dict(to_client(given)) == {"Content-Type": "application/json", "Content-Length": "2"}
