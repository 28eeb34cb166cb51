"""Threads at a shared engine wait for each other: a push waits until a step is scored."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_kl.weights import engine_lock as lock_module
from vllm_kl.weights.engine_lock import EngineLock

WITHIN_S = 60


class TestLock:
    @pytest.fixture
    def lock(self):
        return EngineLock()

    @pytest.fixture
    def collecting(self, lock):
        """A thread that generates, and scores when it is told."""
        pool = ThreadPoolExecutor(1)

        def generate():
            lock.score_here()
            with lock.generating():
                pass

        pool.generate = lambda: pool.submit(generate)
        yield pool
        pool.shutdown()

    @pytest.fixture
    def pushing(self, lock):
        pool = ThreadPoolExecutor(1)

        def push():
            with lock.replacing():
                return time.monotonic()

        pool.push = lambda: pool.submit(push)
        yield pool
        pool.shutdown()

    def test_a_push_waits_for_a_step_that_is_not_scored(self, lock, collecting, pushing):
        collecting.generate().result(WITHIN_S)
        push = pushing.push()
        time.sleep(0.2)
        assert not push.done()
        collecting.submit(lock.close_step).result(WITHIN_S)
        push.result(WITHIN_S)

    def test_a_step_of_its_own_thread_is_not_waited_for(self, lock):
        lock.score_here()
        with lock.generating():
            pass
        with lock.replacing():
            pass

    def test_a_generation_comes_after_a_push_that_waits(self, lock, collecting, pushing):
        collecting.generate().result(WITHIN_S)
        push = pushing.push()
        with ThreadPoolExecutor(1) as pool:

            def generate():
                with lock.generating():
                    return time.monotonic()

            time.sleep(0.1)
            generation = pool.submit(generate)
            time.sleep(0.1)
            assert not generation.done()
            collecting.submit(lock.close_step).result(WITHIN_S)
            assert push.result(WITHIN_S) < generation.result(WITHIN_S)

    def test_who_generates_again_has_given_up_the_step_before(self, lock, collecting, pushing):
        collecting.generate().result(WITHIN_S)
        push = pushing.push()
        again = collecting.generate()
        push.result(WITHIN_S)
        again.result(WITHIN_S)

    def test_a_thread_that_ended_keeps_nobody(self, lock, pushing):
        def generate():
            lock.score_here()
            with lock.generating():
                pass

        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        pushing.push().result(WITHIN_S)

    def test_a_step_that_nobody_scores_keeps_a_push_for_a_while(
        self, collecting, pushing, monkeypatch, caplog
    ):
        monkeypatch.setattr(lock_module, "AT_MOST_S", 0.2)
        collecting.generate().result(WITHIN_S)
        pushing.push().result(WITHIN_S)
        assert "has generated a step that it has not scored in 0.2 s" in caplog.text

    def test_the_version_is_asked_of_an_engine_that_is_free(self, lock):
        with lock.if_free() as is_free, lock.if_free() as is_free_again:
            assert is_free
            assert is_free_again
        with lock, ThreadPoolExecutor(1) as pool:

            def ask():
                with lock.if_free() as is_free:
                    return is_free

            assert pool.submit(ask).result(WITHIN_S) is False
