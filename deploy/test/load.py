"""Load for deploy/test/compose: small requests on new and on kept connections, and slow transfers, until standard input
ends. Prints what was sent and what failed; the exit status is 1 if anything did, or nothing was sent.

Usage: load.py HOST PORT HOST_HEADER"""

import hashlib
import http.client
import os
import sys
import threading
import time

host, port, host_header = sys.argv[1], int(sys.argv[2]), sys.argv[3]
stop = threading.Event()
lock = threading.Lock()
counts = {"new connection": 0, "kept connection": 0, "slow transfer": 0}
failures = []


def count(kind, error=None):
    with lock:
        counts[kind] += 1
        if error:
            failures.append(f"{time.strftime('%H:%M:%S')} {kind}: {error}")


def ask(connection):
    connection.request("GET", "/", headers={"Host": host_header})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200 or b"behind the tunnel" not in body:
        raise RuntimeError(f"{answer.status} {body[:200]!r}")


def small(kind):
    connection = None
    while not stop.is_set():
        try:
            if connection is None:
                connection = http.client.HTTPConnection(host, port, timeout=20)
            ask(connection)
            count(kind)
            if kind == "new connection":
                connection.close()
                connection = None
        except Exception as error:  # whatever a user would see
            count(kind, repr(error))
            connection = None
        time.sleep(0.005)


def slow():
    """Eight seconds of a body that comes back as it goes."""
    while not stop.is_set():
        piece, sent, got = os.urandom(16384), hashlib.sha256(), hashlib.sha256()

        def body():
            for _ in range(80):
                sent.update(piece)
                yield piece
                time.sleep(0.1)

        connection = http.client.HTTPConnection(host, port, timeout=20)
        try:
            connection.request("POST", "/echo", body=body(), headers={"Host": host_header, "Transfer-Encoding": "chunked"}, encode_chunked=True)
            answer = connection.getresponse()
            while data := answer.read(65536):
                got.update(data)
            if answer.status != 200 or got.digest() != sent.digest():
                raise RuntimeError(f"{answer.status}, or other bytes than were sent")
            count("slow transfer")
        except Exception as error:
            count("slow transfer", repr(error))
        connection.close()


threads = [threading.Thread(target=small, args=(kind,)) for kind in ("new connection", "kept connection") for _ in range(2)]
threads += [threading.Thread(target=slow) for _ in range(3)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
print(", ".join(f"{number} by {kind}" for kind, number in counts.items()) + f"; {len(failures)} failed")
print("\n".join(failures[:20]), end="\n" if failures else "")
sys.exit(1 if failures or not all(counts.values()) else 0)
