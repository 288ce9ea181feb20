"""What a load asks: prompts and pictures out of dice, each a new one, so that no server's cache has seen it before."""

from __future__ import annotations

import random
import struct
import zlib

# Everyday words of both languages that the models answer in.
_ENGLISH = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea"
)
_RUSSIAN = (
    "время год человек дело жизнь день рука работа слово место лицо друг глаз вопрос дом сторона страна мир случай "
    "голова ребёнок сила конец вид система часть город отношение женщина деньги земля машина вода отец проблема час "
    "право нога решение дверь образ история власть закон война бог голос тысяча книга возможность результат ночь "
    "стол имя область статья число компания народ жена группа развитие процесс суд условие средство начало свет"
)
WORDS = tuple(_ENGLISH.split() + _RUSSIAN.split())
_TILE_PX = 16
_FILTER_NONE, _FILTER_UP = b"\x00", b"\x02"


def make_prompt(dice: random.Random, num_words: int) -> str:
    """English and Russian words, mixed, joined by spaces; different from its first words on."""
    return " ".join(dice.choices(WORDS, k=num_words))


def make_picture(dice: random.Random, width: int, height: int) -> bytes:
    """A PNG of `width` x `height` pixels, in tiles of random colours.

    Tiles and not noise: noise cannot be compressed, and the load would be its transfer. What the model does with a
    picture depends on its size alone. Written by hand because an encoder that searches for the best filters takes
    five times as long, of a machine that the server may need: a line like the one above is all zeros (PNG, filter Up).
    """
    lines = []
    for top in range(0, height, _TILE_PX):
        colours = dice.randbytes(3 * -(-width // _TILE_PX))
        line = b"".join(colours[i : i + 3] * _TILE_PX for i in range(0, len(colours), 3))[: 3 * width]
        lines.append(_FILTER_NONE + line)
        lines += [_FILTER_UP + bytes(3 * width)] * (min(_TILE_PX, height - top) - 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"".join(lines), 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
