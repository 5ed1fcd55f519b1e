"""What a run tells people beside its numbers: the model card, and events as TensorBoard's own format describes them."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from trainer.loop.test_options import LORA, fit

from quiver_trainer import TrainConfig
from quiver_trainer.reports.tensorboard import EventFile, crc32c


def event_message() -> Any:
    """`Event` of tensorflow/core/util/event.proto, as far as scalars go, read by Google's protobuf."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "Value": [("tag", 1, kinds.TYPE_STRING, ""), ("simple_value", 2, kinds.TYPE_FLOAT, "")],
        "Summary": [("value", 1, kinds.TYPE_MESSAGE, ".t.Value")],
        "Event": [
            ("wall_time", 1, kinds.TYPE_DOUBLE, ""),
            ("step", 2, kinds.TYPE_INT64, ""),
            ("file_version", 3, kinds.TYPE_STRING, ""),
            ("summary", 5, kinds.TYPE_MESSAGE, ".t.Summary"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, type_name in fields:
            label = kinds.LABEL_REPEATED if name == "Summary" else kinds.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, type_name=type_name or None, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # pyright: ignore[reportUnknownMemberType]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def read_events(folder: Path) -> Iterator[Any]:
    """Every record of the one file, its checksums compared."""
    (path,) = folder.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, kind = path.read_bytes(), event_message()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        content, rest = data[12 : 12 + length], data[12 + length :]
        for part, stored in ((data[:8], data[8:12]), (content, rest[:4])):
            checksum = crc32c(part)
            masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", stored)[0] == masked
        yield kind.FromString(content)
        data = rest[4:]


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_events_hold_steps_and_scalars(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "run")
    file.add(7, {"loss": 2.5, "rate": 0.125})
    file.add(300, {"loss": -1.0})
    first, second, third = read_events(tmp_path / "run")
    assert first.file_version == "brain.Event:2"
    assert (second.step, [(v.tag, v.simple_value) for v in second.summary.value]) == (
        7,
        [("loss", 2.5), ("rate", 0.125)],
    )
    assert (third.step, third.summary.value[0].simple_value) == (300, -1.0) and third.wall_time > second.wall_time > 1e9


def test_a_run_leaves_a_card_and_events(make_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = make_config(adapter=[LORA, {"method": "ia3"}], tensorboard=tmp_path / "board")
    record = fit(config)
    card = (config.output / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {config.base.name}\n---\n\n# out\n")
    for text in (
        "An adapter (lora + ia3) for",
        f"| validation loss | {record['validation_loss']:.4f} |",
        f"| exact match | {record['exact_match']:.1%} |",
        f"| train | `train.jsonl` | 6 | 1 | `{record['data']['train']['sha256']}` |",
        "- **lora**: adapter_dim `4`",
        "| `batch_size` | `3` |",
        f"fingerprint `{record['settings']['base']}`",
    ):
        assert text in card, text
    steps = {event.step for event in read_events(tmp_path / "board" / "out")}
    assert steps == set(range(record["steps"] + 1))
