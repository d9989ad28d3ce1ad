"""Small corpora in the layout of the published ones."""

import hashlib
import io
import lzma
import tarfile

from trees import noise


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of these files, compressed as `mode` says."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def speech_files(part: str, speakers: int = 3, utterances: int = 5) -> dict[str, bytes]:
    """`LibriSpeech/<part>/<speaker>/<chapter>/...`, with sounds that are noise."""
    files = {"LibriSpeech/README.TXT": b"about", "LibriSpeech/SPEAKERS.TXT": b"; speakers"}
    for speaker in range(speakers):
        name = f"{100 + speaker}-{7000 + speaker}"
        folder = f"LibriSpeech/{part}/{name.replace('-', '/')}"
        keys = [f"{name}-{i:04d}" for i in range(utterances)]
        lines = [f"{key} IT'S SENTENCE {i} OF {part.upper()}" for i, key in enumerate(keys)]
        files[f"{folder}/{name}.trans.txt"] = ("\n".join(lines) + "\n").encode()
        for i, key in enumerate(keys):
            files[f"{folder}/{key}.flac"] = noise(len(part) * 1000 + speaker * 100 + i, 3000 + 711 * i)
    return files


def limited_files() -> dict[str, bytes]:
    """`librispeech_finetuning/{1h/0 ... 1h/5, 9h}/{clean, other}/<speaker>/<chapter>/...`."""
    files = {}
    for i, group in enumerate([*(f"1h/{n}" for n in range(6)), "9h"]):
        for kind in ("clean", "other"):
            name = f"{300 + i}-{ord(kind[0])}"
            folder = f"librispeech_finetuning/{group}/{kind}/{name.replace('-', '/')}"
            files[f"{folder}/{name}.trans.txt"] = f"{name}-0000 SAID IN {group} {kind}\n".encode()
            files[f"{folder}/{name}-0000.flac"] = noise(i * 1000 + ord(kind[0]), 2000)
    return files


def text_files(number: int, documents: int = 8) -> dict[str, bytes]:
    """The documents of one inner archive of OpenWebText."""
    return {
        f"{i:07d}-{hashlib.md5(b'%d' % (number * 100 + i)).hexdigest()}.txt": (
            f"Document {i} of {number}.\n\n\n" + f"Line {i} of it, caf\u00e9. " * (i * 13 + 5)
        ).encode()
        for i in range(documents)
    }


def web_archive(inner: int = 4) -> bytes:
    """openwebtext.tar.xz: a tar of tars, xz in xz."""
    files = {
        f"openwebtext/urlsf_subset{n:02d}-{n}_data.xz": lzma.compress(tar_of(text_files(n)))
        for n in range(inner)
    }
    return lzma.compress(tar_of(files))


def checksums(files: dict[str, bytes], kind: str = "md5") -> str:
    """As md5sum writes them."""
    return "".join(f"{hashlib.new(kind, content).hexdigest()}  {name}\n" for name, content in files.items())
