"""What a file is that was offered as another kind: told by its first bytes."""

KIND_BYTES = 512  # of a file's beginning

ZIP = "a zip archive, as torch.save writes .pt, .ckpt and .bin"
PICKLE = "a pickle"
LFS_POINTER = "a Git LFS pointer, not the file itself"
WEB_PAGE = "a web page"
XML = "XML, an error message"
JSON = "JSON, an error message or an index"
GGUF = "a GGUF file"
ARCHIVE = "a compressed archive"
TAR = "a tar"
SAFETENSORS = "a safetensors file"
PICTURE = "a picture"
HEIC = "HEIC, AVIF or a video"
TEXT = "a text file"

# in lower case, without white space in front
FIRST_BYTES = (
    (b"gguf", GGUF),
    (b"pk\x03\x04", ZIP),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"version https://git-lfs", LFS_POINTER),
    (b"<!doctype", WEB_PAGE),
    (b"<html", WEB_PAGE),
    (b"<?xml", XML),
    (b"{", JSON),
    (b"\x1f\x8b", ARCHIVE),
    (b"bzh", ARCHIVE),
    (b"\xfd7zxz", ARCHIVE),
    (b"(\xb5/\xfd", ARCHIVE),
    (b"7z\xbc\xaf", ARCHIVE),
    (b"rar!", ARCHIVE),
    (b"\x89png", PICTURE),
    (b"\xff\xd8\xff", PICTURE),
    (b"riff", PICTURE),
    (b"gif8", PICTURE),
    (b"\x93numpy", "a NumPy array"),
    (b"\x89hdf", "an HDF5 file"),
    (b"par1", "a Parquet file"),
    (b"%pdf", "a PDF"),
)


def file_kind(start):
    """What a file is whose first `KIND_BYTES` bytes, or all, are `start`; None for what is not
    known.
    """
    if start[257:262] == b"ustar":
        return TAR
    if start[8:9] == b"{":  # the length in front may look like anything
        return SAFETENSORS
    if start[4:8] == b"ftyp":
        return HEIC
    plain = start.lstrip().lower()
    found = next((what for magic, what in FIRST_BYTES if plain.startswith(magic)), None)
    return found or (TEXT if is_text(start) else None)


def is_text(start):
    """Whether bytes are the beginning of a text in UTF-8."""
    text = start.decode(errors="replace").rstrip("\ufffd")  # a letter that is cut
    return bool(text) and all(letter.isprintable() or letter.isspace() for letter in text)
