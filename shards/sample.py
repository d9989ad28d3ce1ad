"""The small sample data: one handwritten digit seen, spoken and written out, and prose for the text model.

Every source comes with a package or with Python itself, so nothing is downloaded: the digit images are
the UCI digits that scikit-learn ships, the speech is espeak-ng's, the prose is Python's documentation.
Real enough to learn from, small enough to commit; what is traded is variety, so no number measured here
says anything about ImageNet, LibriSpeech or OpenWebText.

    python -m shards.sample --out DIR                     multimodal and text shards, tokenizer
    python -m shards.sample --out DIR --images-only       image shards; needs neither espeak-ng nor torch

Two runs with one seed, one Python and one espeak-ng write the same bytes.
"""

import argparse
import ast
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from shards.tokenizer import train_sentencepiece
from shards.writer import Sample, group_by_bytes, write_bytes, write_tar

# The split of the source digits does not depend on --seed: two sets never leak into one another.
SPLIT_SEED = 1797
NUM_TRAIN_DIGITS = 1297
SPLITS = ("train", "val", "test")

IMAGE_SIZE = 32
DIGIT_SIZES = range(16, 25)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("the digit {}", "number {} please", "I see a {}", "this is {}", "it says {}", "press {} now")
PHRASE_SHARE = 1 / 3

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.6
PEAK = 0.8  # Vorbis overshoots by up to 0.13
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
# Train and validation hear different speakers, so they share no (voice, rate).
VARIANTS = {"train": ("m1", "m2", "m3", "m5", "m7", "f1", "f3", "f5"), "val": ("m4", "m6", "f2", "f4")}
RATES = range(80, 170, 10)  # words per minute; 80 is espeak-ng's slowest, at 220 a digit lasts 0.3 s only
PITCHES = range(20, 81)

# 260 ids are special or bytes; of the other 740 in this text, half come 213 times or more and 85 % 100 times.
# More pieces would be rarer ones, and give fewer tokens of a text that is small already (330,000 tokens).
VOCAB_SIZE = 1000
TEXT_VAL_SHARE = 0.1

MULTIMODAL_SHARD_BYTES = 2_000_000
TEXT_SHARD_BYTES = 500_000
IMAGE_SHARD_BYTES = 50_000_000
OWN_TAR = re.compile(r"(multimodal|text|images)-(train|val|test)-\d{6}\.tar")


# ---- digits, seen ----


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 UCI digits as scikit-learn ships them: images (N, 8, 8) of 0..16, and labels (N,)."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    return digits.images, digits.target


def split_digits(split: str) -> np.ndarray:
    """The source indices that belong to `split`; val and test are the same 500."""
    order = np.random.RandomState(SPLIT_SEED).permutation(1797)
    return order[:NUM_TRAIN_DIGITS] if split == "train" else order[NUM_TRAIN_DIGITS:]


def draw_digits(split: str, count: int, seed: int) -> list[int]:
    """`count` source indices of `split`, none twice before all came once."""
    pool = split_digits(split)
    random = np.random.RandomState([seed, SPLITS.index(split)])
    passes = [random.permutation(pool) for _ in range(-(-count // len(pool)))]
    return [int(index) for index in itertools.chain.from_iterable(passes)][:count]


def compose_digit(digit_8x8: np.ndarray, size: int, x: int, y: int) -> Image.Image:
    """A black 32x32 grey-scale picture with the digit, `size` wide, whose top left corner is at (x, y)."""
    digit = Image.fromarray(np.rint(digit_8x8 * (255 / 16)).astype(np.uint8))
    picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    picture.paste(digit.resize((size, size), Image.Resampling.BICUBIC), (x, y))
    return picture


def draw_place(random: np.random.RandomState) -> dict[str, int]:
    """Size and place of a digit, wholly inside the picture."""
    size = int(random.choice(DIGIT_SIZES))
    x, y = random.randint(0, IMAGE_SIZE - size + 1, 2)
    return {"size": size, "x": int(x), "y": int(y)}


def encode_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


# ---- digits, spoken ----


def check_espeak() -> None:
    """Raises where espeak-ng is absent."""
    if shutil.which("espeak-ng") is None:
        raise ValueError(
            "espeak-ng is not on the PATH; it speaks the digits of the multimodal shards: "
            "`apt-get install espeak-ng`, or --images-only, which needs no speech"
        )


def draw_speech(random: np.random.RandomState, digit: int, split: str) -> tuple[str, dict]:
    """What is said, and by which voice, at which rate and pitch."""
    phrase = str(random.choice(PHRASES)) if random.rand() < PHRASE_SHARE else "{}"
    text = phrase.format(WORDS[digit]).replace("a eight", "an eight")
    voice = f"{random.choice(ACCENTS)}+{random.choice(VARIANTS[split])}"
    return text, {"voice": voice, "rate": int(random.choice(RATES)), "pitch": int(random.choice(PITCHES))}


def speak(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """The text spoken by espeak-ng: 16 kHz mono float32, silence trimmed, peak-normalised."""
    import soundfile
    import torch
    from torchaudio.functional import resample

    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdout", text]
    spoken = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    wave, native_rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    wave = resample(torch.from_numpy(wave), native_rate, SAMPLE_RATE).numpy()
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    margin = SAMPLE_RATE // 50  # 20 ms, so that no onset is cut
    wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
    return wave * (PEAK / np.abs(wave).max())


def pad_to_min(wave: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The clip, with silence around it where it is shorter than 0.6 s; where it lies is drawn."""
    missing = max(0, round(MIN_SECONDS * SAMPLE_RATE) - len(wave))
    lead = random.randint(0, missing + 1)
    return np.pad(wave, (lead, missing - lead))


def encode_audio(wave: np.ndarray, audio: str) -> bytes:
    """The clip as Ogg Vorbis (`ogg`, 5 kB a second and 3.6 kB of headers) or FLAC (`flac`)."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format=audio.upper())
    return fix_ogg_serial(file.getvalue()) if audio == "ogg" else file.getvalue()


def fix_ogg_serial(data: bytes) -> bytes:
    """The Ogg stream with serial number 1: libsndfile draws it from the clock, and two runs would differ."""
    fixed, start = bytearray(data), 0
    while start < len(fixed):
        num_segments = fixed[start + 26]
        end = start + 27 + num_segments + sum(fixed[start + 27 : start + 27 + num_segments])
        fixed[start + 14 : start + 18] = (1).to_bytes(4, "little")
        fixed[start + 22 : start + 26] = bytes(4)
        fixed[start + 22 : start + 26] = ogg_checksum(bytes(fixed[start:end])).to_bytes(4, "little")
        start = end
    return bytes(fixed)


REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_checksum(page: bytes) -> int:
    """Ogg's CRC-32: zlib's polynomial, highest bit first, start and end not inverted."""
    reflected = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


# ---- prose ----

SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}
# A module with a notice of its own may stand under terms of its own, so it is left out.
OWN_NOTICE = re.compile(r"copyright(?!.*Python Software Foundation)|permission (is hereby|to use)", re.I)
HEADING = re.compile(r"^(\S.*)\n([*=\-~^])\2{2,}$", re.M)
NOT_PROSE = re.compile(r">>>|\.\.\. |::=|\+--|--\+|==|->|\|.*\||\S {3,}\S|^[$#%@]|[{}\\]", re.M)
BULLET = re.compile(r"^([*\-+o]|\(?\w[.)])\s+")
MARKUP = (
    (re.compile(r":[\w:]+:`~?([^`<]+)[^`]*`"), r"\1"),  # :func:`name`
    (re.compile(r"`{1,2}([^`]+?)(`{1,2}|')"), r"\1"),  # ``literal``, `literal`, `quoted'
    (re.compile(r"\*\*(\w[^*]*)\*\*"), r"\1"),
    (re.compile(r"\*(\w[^*]*)\*"), r"\1"),
    (re.compile(r"\s*\[\d+\]_?"), ""),  # footnote
    (re.compile(r"(?<=\w)-\s*\n\s*(?=[a-z])"), "-"),  # a word wrapped at its hyphen
    (re.compile(r"::$"), ":"),
    (re.compile(r"\s+"), " "),
)


def clean_paragraph(block: str) -> str | None:
    """The block as one line of plain prose; None for code, tables, headings, signatures and fragments."""
    if NOT_PROSE.search(block):
        return None
    text = BULLET.sub("", block.strip())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    plain = sum(char.isalpha() or char == " " for char in text)
    is_sentence = re.match(r"[A-Z\"'(]", text) and re.search(r"[.:!?][\"')]?$", text)
    return text if is_sentence and len(text.split()) >= 8 and plain >= 0.88 * len(text) else None


def read_topics() -> Iterator[tuple[str, str]]:
    """(source, raw text) of every section of the language reference that `pydoc` carries."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        # HEADING has two groups: before, title, underline, body, title, underline, body, ...
        before, *sections = HEADING.split("\n" + topics[name])
        yield f"topics/{name}", before
        for title, body in zip(sections[::3], sections[2::3], strict=True):
            yield f"topics/{name}/{'-'.join(re.findall(r'[a-z0-9]+', title.lower()))}", body


def read_docstrings() -> Iterator[tuple[str, str]]:
    """(source, raw text) of every module of the standard library: its docstrings; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        code = "" if SKIPPED_FOLDERS & set(relative.parts) else path.read_text("utf-8", errors="replace")
        if not code or OWN_NOTICE.search(code):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield f"stdlib/{module}", "\n\n".join(find_docstrings(ast.parse(code)))


def find_docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of all inside it, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from find_docstrings(child)


def read_documents() -> list[tuple[str, str]]:
    """(source, prose) of every section with prose, one paragraph a line, no paragraph twice in all."""
    seen, documents = set(), []
    for source, raw in itertools.chain(read_topics(), read_docstrings()):
        paragraphs = []
        for block in re.split(r"\n\s*\n", raw):
            text = clean_paragraph(block)
            if text and text not in seen:
                seen.add(text)
                paragraphs.append(text)
        if sum(map(len, paragraphs)) >= 200:
            documents.append((source, "\n".join(paragraphs) + "\n"))
    return documents


def split_documents(documents: list[tuple[str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """The documents in a drawn order, 90 % for train and 10 % for val."""
    order = np.random.RandomState(seed).permutation(len(documents))
    num_val = round(TEXT_VAL_SHARE * len(documents))
    shuffled = [documents[index] for index in order]
    return {"train": shuffled[num_val:], "val": shuffled[:num_val]}


# ---- shards ----


def write_shards(samples: Iterable[Sample], pattern: str, max_bytes: int) -> list[Path]:
    """Writes `pattern % 0`, `pattern % 1`, ...; removes what an older run left of the same pattern beyond."""
    paths = []
    for number, group in enumerate(group_by_bytes(samples, max_bytes)):
        paths.append(Path(pattern % number))
        write_bytes(paths[-1], partial(write_tar, group))
    parent = Path(pattern).parent
    for old in parent.glob(Path(pattern).name.replace("%06d", "[0-9]" * 6)):
        if old not in paths:
            old.unlink()
    return paths


def encode_json(labels: dict) -> bytes:
    return json.dumps(labels).encode()


def show_progress(samples: Iterable[Sample], name: str, total: int) -> Iterator[Sample]:
    """Passes the samples on and counts them in one line of stderr."""
    for number, sample in enumerate(samples, 1):
        print(f"\r{name} {number}/{total}", end="\n" if number == total else "", file=sys.stderr, flush=True)
        yield sample


# ---- what a run writes ----


def make_image_sample(
    index: int, source_index: int, *, images: np.ndarray, digits: np.ndarray, split: str, seed: int
) -> Sample:
    random = np.random.RandomState([seed, SPLITS.index(split), index])
    digit, place = int(digits[source_index]), draw_place(random)
    labels = {"digit": digit, "label": digit, **place, "source_index": source_index, "split": split}
    return {
        "__key__": f"image-{split}-{index:06d}",
        "png": encode_png(compose_digit(images[source_index], **place)),
        "cls": str(digit).encode(),
        "json": encode_json(labels),
    }


def make_multimodal_sample(
    index: int,
    source_index: int,
    *,
    images: np.ndarray,
    digits: np.ndarray,
    split: str,
    seed: int,
    audio: str,
) -> Sample:
    random = np.random.RandomState([seed, SPLITS.index(split), index])
    digit, place = int(digits[source_index]), draw_place(random)
    text, speech = draw_speech(random, digit, split)
    wave = pad_to_min(speak(text, **speech), random)
    labels = {"digit": digit, "label": digit, **place, **speech, "source_index": source_index}
    labels |= {"split": split, "seconds": round(len(wave) / SAMPLE_RATE, 4)}
    return {
        "__key__": f"{split}-{index:06d}",
        "png": encode_png(compose_digit(images[source_index], **place)),
        audio: encode_audio(wave, audio),
        "txt": text.encode(),
        "json": encode_json(labels),
        "cls": str(digit).encode(),
    }


def write_images(out: str | Path, train: int = 4000, test: int = 1000, seed: int = 0) -> list[Path]:
    """Image-only shards (png, cls, json), composed from the 1,297 train and the 500 other digits."""
    images, digits = load_digits()
    paths = []
    for split, count in (("train", train), ("test", test)):
        make = partial(make_image_sample, images=images, digits=digits, split=split, seed=seed)
        samples = itertools.starmap(make, enumerate(draw_digits(split, count, seed)))
        paths += write_shards(samples, f"{out}/images-{split}-%06d.tar", IMAGE_SHARD_BYTES)
    return paths


def write_multimodal(
    out: str | Path,
    samples: int = 450,
    val_samples: int = 120,
    seed: int = 0,
    audio: str = "ogg",
    jobs: int | None = None,
) -> list[Path]:
    """Shards whose every sample is one digit as png, ogg or flac, txt, json and cls; needs espeak-ng."""
    check_espeak()
    images, digits = load_digits()
    paths = []
    for split, count in (("train", samples), ("val", val_samples)):
        make = partial(
            make_multimodal_sample, images=images, digits=digits, split=split, seed=seed, audio=audio
        )
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:  # the work is in espeak-ng and in C
            made = pool.map(make, range(count), draw_digits(split, count, seed))
            shown = show_progress(made, f"multimodal-{split}", count)
            paths += write_shards(shown, f"{out}/multimodal-{split}-%06d.tar", MULTIMODAL_SHARD_BYTES)
    return paths


def make_text_sample(index: int, document: tuple[str, str], *, split: str) -> Sample:
    source, prose = document
    labels = {"source": source, "split": split}
    return {
        "__key__": f"text-{split}-{index:06d}",
        "txt": prose.encode(),
        "json": encode_json(labels),
    }


def write_text(out: str | Path, seed: int = 0) -> list[Path]:
    """Shards of English prose (txt, json), and `sentencepiece.model` trained on the train part."""
    splits = split_documents(read_documents(), seed)
    paths = []
    for split, documents in splits.items():
        samples = itertools.starmap(partial(make_text_sample, split=split), enumerate(documents))
        paths += write_shards(samples, f"{out}/text-{split}-%06d.tar", TEXT_SHARD_BYTES)
    lines = itertools.chain.from_iterable(prose.splitlines() for _, prose in splits["train"])
    phrases = [phrase.format(word) for phrase in ("{}", *PHRASES) for word in WORDS]
    tokenizer = train_sentencepiece([*lines, *phrases], "bpe", VOCAB_SIZE, max_line=100_000)
    paths.append(Path(out) / "sentencepiece.model")
    write_bytes(paths[-1], lambda file: file.write(tokenizer))
    return paths


# ---- command line ----


def check_out(out: Path) -> None:
    """Raises where the folder holds shards of something else, which a reader of `*.tar` would mix in."""
    others = sorted(path.name for path in out.glob("*.tar") if not OWN_TAR.fullmatch(path.name))
    if others:
        raise ValueError(
            f"--out {out} holds {len(others)} other tar files ({others[0]}, ...), and sample shards are "
            "kept apart from other data; give an empty or a new folder"
        )


def count_argument(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shards.sample",
        description="Write the sample shards: digits seen, spoken and written out; prose; a tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    out_help = "folder to write into; its older sample shards are replaced"
    add("--out", type=Path, required=True, default=argparse.SUPPRESS, help=out_help)
    add("--samples", type=count_argument, default=450, help="multimodal train samples")
    add("--val-samples", type=count_argument, default=120, help="multimodal validation samples")
    add("--seed", type=count_argument, default=0, help="everything drawn follows from it")
    add("--audio", choices=("ogg", "flac"), default="ogg", help="how speech is stored")
    add("--jobs", type=count_argument, default=os.cpu_count(), help="clips spoken at the same time")
    add("--images-only", action="store_true", help="write only image shards; no espeak-ng, no torch needed")
    add("--images-train", type=count_argument, default=4000, help="train digits of --images-only")
    add("--images-test", type=count_argument, default=1000, help="test digits of --images-only")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        check_out(args.out)
        if not args.images_only:
            check_espeak()
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.images_only:
        paths = write_images(args.out, args.images_train, args.images_test, args.seed)
    else:
        paths = write_multimodal(args.out, args.samples, args.val_samples, args.seed, args.audio, args.jobs)
        paths += write_text(args.out, args.seed)
    for path in paths:
        print(f"{path.stat().st_size:>12,}  {path}")


if __name__ == "__main__":
    main()
