// Pictures and videos that the user gives: how they look and how they travel.

import { element } from "./elements.js";

const MAX_BYTES = 44 * 2 ** 20; // as base64 in JSON still below what the server takes by default

export class Medium {
  // `digest` is set once the server has said it; from then on 64 digits travel instead of the bytes.
  constructor(file) {
    this.file = file;
    this.name = file.name || "pasted picture";
    this.isVideo = file.type.startsWith("video/");
    this.source = URL.createObjectURL(file);
    this.digest = "";
  }

  async part(options) {
    const url = this.digest ? `ivl:sha256:${this.digest}` : await dataUrl(this.file);
    return this.isVideo
      ? { type: "video_url", video_url: { url } }
      : { type: "image_url", image_url: { url, ...options } };
  }

  view(attributes) {
    return this.isVideo
      ? element("video", { src: this.source, muted: "", playsinline: "", "aria-label": this.name, ...attributes })
      : element("img", { src: this.source, alt: this.name });
  }

  forget() {
    URL.revokeObjectURL(this.source);
  }
}

// Returns [media, complaints].
export function mediaOf(files) {
  const media = [];
  const complaints = [];
  for (const file of files) {
    if (!/^(image|video)\//.test(file.type)) complaints.push(`${file.name} is neither a picture nor a video.`);
    else if (file.size > MAX_BYTES) complaints.push(`${file.name} is too large: at most ${MAX_BYTES >> 20} MiB.`);
    else media.push(new Medium(file));
  }
  return [media, complaints];
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
