import threading

from infra import pulse


def test_every_listener_hears_beats_of_any_thread_while_it_listens():
    heard: list[str] = []
    with pulse.listening(lambda: heard.append("outer")):
        pulse.beat()
        with pulse.listening(lambda: heard.append("inner")):
            thread = threading.Thread(target=pulse.beat)
            thread.start()
            thread.join()
        pulse.beat()
    pulse.beat()
    assert heard == ["outer", "outer", "inner", "outer"]
