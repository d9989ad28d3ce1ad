"""What the servers of the Hugging Face hub and of Google Cloud Storage answer, as far as reading shards asks."""

import json
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "5eed" * 10


class Hub:
    """The dataset `owner/name`, with one revision."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __call__(self, path: str, posted: bytes) -> bytes | None:
        parts = unquote(urlsplit(path).path).split("/")
        if parts[:3] == ["api", "datasets", "owner"] and parts[3] == "name":
            if parts[4:5] == ["tree"]:
                return as_json(self.entries("/".join(parts[6:])))
            return as_json({"id": "owner/name", "sha": SHA, "private": False, "tags": [], "siblings": []})
        if parts[:4] == ["datasets", "owner", "name", "resolve"]:
            return self.files.get("/".join(parts[5:]))
        return None

    def entries(self, folder: str) -> list[dict[str, object]]:
        """What lies in a folder."""
        begin = f"{folder}/" if folder else ""
        found = {}
        for name, content in self.files.items():
            if name.startswith(begin):
                child, slash, _ = name.removeprefix(begin).partition("/")
                kind = {"type": "directory"} if slash else {"type": "file", "size": len(content)}
                found[child] = {"path": begin + child, "oid": SHA, **kind}
        return list(found.values())


class Bucket:
    """The bucket `bucket`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __call__(self, path: str, posted: bytes) -> bytes | None:
        url = urlsplit(path)
        place, query = unquote(url.path), parse_qs(url.query)
        for begin in ("download/storage/v1/b/bucket/o/", "storage/v1/b/bucket/o/"):
            if place.startswith(begin):
                name = place.removeprefix(begin)
                if name not in self.files:
                    return None
                return self.files[name] if "alt" in query else as_json(self.entry(name))
        if place == "storage/v1/b/bucket/o":
            prefix = query.get("prefix", [""])[0]
            return as_json({"items": [self.entry(name) for name in self.files if name.startswith(prefix)]})
        return None

    def entry(self, name: str) -> dict[str, object]:
        return {"name": name, "bucket": "bucket", "size": str(len(self.files[name])), "generation": "1"}


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
