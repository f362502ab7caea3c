from evaluation import machine


def test_facts_name_the_machine() -> None:
    found = machine.facts()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1 << 20
    assert found["transparent_huge_pages"] in {"always", "madvise", "never", "unknown"}
    assert all(found[key] for key in ("cpu", "kernel", "os"))


def test_a_watched_block_tells_its_time_and_what_the_machine_did() -> None:
    with machine.watched() as found:
        assert found == {}
    assert set(found) == {"seconds", "pressure_s", "steal_s", "load"}
    assert found["seconds"] > 0
    assert found["pressure_s"] >= 0
    assert found["steal_s"] >= 0
