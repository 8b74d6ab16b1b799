"""For processes that talk to a hub: its clients wait longer before each retry, 20 seconds in all."""

NO_WAITING = """
import threading, time
sleep, wait = time.sleep, threading.Event.wait
time.sleep = lambda seconds: sleep(min(seconds, 0.05))
threading.Event.wait = lambda self, timeout=None: wait(self, timeout and min(timeout, 0.05))
"""
