"""Pictures and videos in place of those that vLLM's tests fetch from a bucket: of the same kinds, showing something else.

A server on this machine makes each when it is first asked for, by what its name says: size, mode, format.
"""

import http.server
import io
import os
import re
import tempfile
import threading
from functools import lru_cache

SIZE = (640, 480)
# Frames of a video, so many a second, of this size.
FRAMES, RATE, FRAME_SIZE = 64, 16, (320, 240)
CODECS = {"mp4": "mp4v", "avi": "MJPG"}


def picture(name, form):
    from PIL import Image, ImageDraw

    said = re.search(r"(\d+)x(\d+)", name)
    size = tuple(map(int, said.groups())) if said else SIZE
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(image)
    third = [side // 3 for side in size]
    draw.ellipse([*third, 2 * third[0], 2 * third[1]], fill=(200, 30, 30))
    if "RGBA" in name:
        image.putalpha(Image.linear_gradient("L").rotate(90).resize(size))
    elif "palette" in name:
        image = image.convert("L").convert("P")
    data = io.BytesIO()
    image.save(data, {"jpg": "JPEG", "jpeg": "JPEG"}.get(form, form.upper()))
    return data.getvalue()


def video(form):
    import cv2
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"video.{form}")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*CODECS[form]), RATE, FRAME_SIZE)
        for number in range(FRAMES):
            frame = numpy.full((*FRAME_SIZE[::-1], 3), 230, numpy.uint8)
            cv2.circle(frame, (10 + 4 * number, 120), 30, (40, 40, 200), -1)
            writer.write(frame)
        writer.release()
        with open(path, "rb") as file:
            return file.read()


@lru_cache
def stand_in(name):
    form = name.rsplit(".", 1)[-1].lower()
    if form in CODECS:
        return video(form)
    return picture(name, form) if form in ("jpg", "jpeg", "png", "webp") else None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = stand_in(self.path.rsplit("/", 1)[-1])
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_):
        pass


def serve():
    """Starts the server and returns its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
