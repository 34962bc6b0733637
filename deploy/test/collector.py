#!/usr/bin/env python3
"""A stand-in for a collector: takes spans by OTLP (HTTP, protobuf) on port 4318 and gives those of a trace back.

GET /TRACE_ID answers a line a span: service, name, span id, parent's id. Reads of the protocol only what that needs.
"""
import gzip
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SPANS = []


def number(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def fields(data):
    """The fields of a protobuf message: (number, value)."""
    at = 0
    while at < len(data):
        tag, at = number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = number(data, at)
        elif kind == 2:
            length, at = number(data, at)
            value, at = data[at : at + length], at + length
        else:
            length = {1: 8, 5: 4}[kind]
            value, at = data[at : at + length], at + length
        yield tag >> 3, value


def first(data, field, otherwise=b""):
    return next((value for known, value in fields(data) if known == field), otherwise)


def every(data, field):
    return [value for known, value in fields(data) if known == field]


def service_of(resource):
    for attribute in every(resource, 1):
        if first(attribute, 1) == b"service.name":
            return first(first(attribute, 2), 1).decode()
    return "?"


def take(request):
    for of_resource in every(request, 1):
        service = service_of(first(of_resource, 1))
        for scope in every(of_resource, 2):
            for span in every(scope, 2):
                ids = [first(span, field).hex() or "-" for field in (1, 2, 4)]
                SPANS.append((ids[0], f"{service}\t{first(span, 5).decode()}\t{ids[1]}\t{ids[2]}"))


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
        self.answer(b"")

    def do_GET(self):
        lines = [line for trace, line in SPANS if trace == self.path[1:]]
        self.answer("".join(line + "\n" for line in lines).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", 4318), Collector).serve_forever()
