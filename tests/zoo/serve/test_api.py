"""The JSON API: its answers are those of the Python interface, and for what is no picture there is one sentence."""

import io
import re
import zipfile

import numpy as np
import pytest
import timm

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")

from PIL import Image
from serving import NAME, encoded, error_of, picture, post, serving

from zoo.classifier import Classifier
from zoo.serve import Limits, Models


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return encoded(picture(1), "JPEG", exif=exif)


def deep():
    rows = np.linspace(0, 65535, 50 * 40).reshape(40, 50).astype(np.uint16)
    return encoded(Image.fromarray(rows))


def animated(kind):
    return encoded(picture(2), kind, save_all=True, append_images=[picture(3), picture(4)])


PICTURES = {
    "png": lambda: encoded(),
    "jpeg": lambda: encoded(kind="JPEG"),
    "exif": rotated,
    "cmyk": lambda: encoded(picture(5).convert("CMYK"), "JPEG"),
    "16 bits": deep,
    "grey": lambda: encoded(picture(6).convert("L")),
    "palette": lambda: encoded(picture(7).quantize(16)),
    "transparent": lambda: encoded(picture(8).convert("RGBA").rotate(30)),
    "gif": lambda: animated("GIF"),
    "webp": lambda: animated("WEBP"),
    "one pixel": lambda: encoded(picture(9, (1, 1))),
    "line": lambda: encoded(picture(10, (3000, 2))),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_it_names_what_the_classifier_names(client, classifier, kind):
    data = PICTURES[kind]()
    (expected,) = classifier.predict(data, 4)
    found = post(client, data, top_k=4).json()
    assert found["model"] == NAME
    assert found["names"] == list(expected.names) and found["indices"] == list(expected.indices)
    assert found["probabilities"] == pytest.approx(expected.probabilities, rel=1e-4)


def test_pictures_get_different_answers(client):
    found = [post(client, encoded(picture(seed))).json()["probabilities"][0] for seed in range(4)]
    assert len(set(found)) == 4 and max(found) > 0.01


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("picture.png", bytes(10**6))
    return file.getvalue()


BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a picture", "not a picture"),
    "zeros": (bytes(1000), "not a picture"),
    "cut jpeg": (encoded(kind="JPEG")[:300], "damaged or cut short"),
    "cut png": (encoded()[:-200], "damaged or cut short"),
    "only a start": (encoded()[:8], "damaged"),
    "zip": (archive(), "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "not a picture"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not a picture"),
    "pickle": (b"cos\nsystem\n(S'true'\ntR.", "not a picture"),
    "path": (b"/etc/passwd", "not a picture"),
    "address": (b"http://127.0.0.1/picture.png", "not a picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_gets_one_sentence(client, kind):
    data, reason = BAD[kind]
    text = error_of(post(client, data), 422)
    assert text.startswith("The picture is ") and reason in text


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\r\nb.png", "x" * 900, "http://127.0.0.1:1/a"])
def test_the_name_of_an_upload_is_not_looked_at(client, name):
    assert post(client, encoded(), name=name).json() == post(client, encoded()).json()
    assert error_of(post(client, b"hello", name=name), 422) == error_of(post(client, b"hello"), 422)


def test_a_bomb_is_refused_before_it_is_decoded(classifier):
    with serving(classifier, Limits(pixels=50_000)) as client:
        bomb = encoded(Image.new("1", (9000, 9000)))
        assert len(bomb) < 20_000
        assert "more than 50,000 pixels" in error_of(post(client, bomb), 422)
        assert "more than 50,000 pixels" in error_of(post(client, encoded(picture(0, (251, 200)))), 422)
        assert post(client, encoded(picture(0, (250, 200)))).status_code == 200
    assert Image.MAX_IMAGE_PIXELS > 50_000  # as it was before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"top_k": 0}, "top_k: "),
        ({"top_k": "many"}, "top_k: "),
        ({"top_k": "1" * 5000}, "top_k: "),
        ({"model": "van_b6"}, "no classifier 'van_b6'"),
        ({"model": "/etc/passwd"}, "no classifier"),
        ({"model": "hf-hub:owner/model"}, "no classifier"),
    ],
)
def test_wrong_fields(client, fields, reason):
    assert reason in error_of(post(client, encoded(), **fields), 422)


@pytest.mark.parametrize("value", ["/etc/passwd", "http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:image/png,"])
def test_a_path_or_an_address_is_no_upload(client, value):
    assert error_of(client.post("/api/classify", data={"image": value}), 422).startswith("image: ")
    assert error_of(client.post("/api/classify", json={"image": value}), 422).startswith("image: ")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"nonsense", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nx',
            "multipart/form-data; boundary=b",
        ),
        (encoded(), "image/png"),
        (b"{", "application/json"),
    ],
)
def test_malformed_forms(client, body, kind):
    response = client.post("/api/classify", content=body, headers={"content-type": kind})
    error_of(response, response.status_code)
    assert response.status_code in (400, 422)


def test_a_form_of_too_many_parts(client):
    body = b"".join(b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' for _ in range(3000)) + b"--b--"
    response = client.post("/api/classify", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert "Too many fields" in error_of(response, 400)


def test_the_overview(client):
    found = client.get("/api/models").json()
    assert found["classifiers"] == [NAME] and not found["detect"] and found["limits"]["queue"] == 32


def test_nothing_else_is_there(client):
    """Gradio has routes of these names for the functions of a page."""
    for path in ("", "predict", "nothing", "classify/", "classify/more", "models/../predict"):
        assert "nothing at this address" in error_of(client.post(f"/api/{path}", json={"data": []}), 404)
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        assert "nothing at this address" in error_of(client.request(method, "/api/classify"), 404)


def test_models_that_are_not_served(client, classifier):
    assert "left out" in error_of(post(client, encoded(), "detect"), 501)
    assert "chat is not served" in error_of(post(client, encoded(), "chat", question="what?"), 501)
    models = Models({NAME: classifier}, missing={"segment": "There are no weights."})
    with serving(models) as other:
        assert error_of(post(other, encoded(), "segment"), 501).endswith("There are no weights.")


def test_compare(classifier):
    other = Classifier(timm.create_model("test_vit"))
    with serving(Models({NAME: classifier, "test_vit": other})) as client:
        data = encoded()
        found = post(client, data, "compare", first=NAME, second="test_vit", top_k=3).json()["models"]
        assert [one["model"] for one in found] == [NAME, "test_vit"]
        for one, model in zip(found, (classifier, other)):
            assert one["answer"]["names"] == list(model.predict(data, 3)[0].names)
            assert one["seconds"] > 0
        known, unserved = post(client, data, "compare", second="van_b0").json()["models"]
        assert known["answer"] and unserved["answer"] is None
        assert (unserved["params"], unserved["macs"], unserved["top1"]) == (4_105_800, 864_224_000, 75.4)
        for name in ("resnet50", "/tmp/model.py:make", "hf-hub:owner/model"):
            assert "no model of the zoo" in error_of(post(client, data, "compare", second=name), 422)


def test_the_openapi_document(client):
    document = client.get("/openapi.json").json()
    names = ("models", "classify", "detect", "segment", "compare", "chat")
    assert set(document["paths"]) == {f"/api/{name}" for name in names}
    classify = document["paths"]["/api/classify"]["post"]
    assert {"200", "401", "413", "422", "503", "504"} <= set(classify["responses"])
    assert classify["security"] == [{"HTTPBearer": []}]
    page = client.get("/docs").text
    scripts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(scripts) > 2 and all(script.startswith("/static-offline-docs/") for script in scripts)
    assert all(client.get(script).status_code == 200 for script in scripts)
