import os
import signal
import threading

import pytest

from nnunetv2_semisup.training.stopping import StopRequest


@pytest.fixture
def stop():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest()
    request.listen()
    yield request
    request.stop_listening()
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_noted(stop, number, code):
    assert not stop.wanted
    os.kill(os.getpid(), number)
    assert stop.wanted and stop.exit_code == code and stop.name == number.name and not stop.agreed


def test_second_interrupt_interrupts(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_after_termination_does_not_interrupt(stop):
    """torch.multiprocessing sends SIGINT to the processes of a parent that was terminated; the save must go on."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGTERM" and stop.exit_code == 143


def test_a_thread_may_hold_one_without_handlers():
    errors = []

    def target():
        try:
            StopRequest().listen()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert not errors


def test_told_by_another_process():
    request = StopRequest()
    request.agreed = True
    assert request.exit_code == 143 and not request.wanted and "another process" in request.name
