"""A name server for one name, as a cluster's DNS has it for a headless Service: the addresses of the ready pods."""

import socket
import struct
import threading
from types import TracebackType
from typing import Self

_A, _IN = 1, 1
_ANSWER, _NO_SUCH_NAME = 0x8180, 0x8183
_NAME_OF_THE_QUESTION = 0xC00C
_HEADER_BYTES = 12
_TTL_SECONDS = 1


class NameServer:
    """Answers over UDP until closed. `addresses`: what `name` stands for now."""

    def __init__(self, name: str, addresses: list[str]) -> None:
        self.addresses = addresses
        self._name = name
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An empty datagram ends the thread.
        self._socket.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        labels, position = list[str](), _HEADER_BYTES
        while length := query[position]:
            labels.append(query[position + 1 : position + 1 + length].decode())
            position += 1 + length
        question = query[_HEADER_BYTES : position + 5]
        kind, _ = struct.unpack("!HH", question[-4:])
        known = ".".join(labels) == self._name
        found = self.addresses if known and kind == _A else []
        header = query[:2] + struct.pack("!HHHHH", _ANSWER if known else _NO_SUCH_NAME, 1, len(found), 0, 0)
        records = [
            struct.pack("!HHHIH", _NAME_OF_THE_QUESTION, _A, _IN, _TTL_SECONDS, 4) + socket.inet_aton(address)
            for address in found
        ]
        return header + question + b"".join(records)
