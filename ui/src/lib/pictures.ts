// Pictures that a person drops, pastes or selects, as `data:` addresses.

/** What the server decodes. */
export const PICTURE_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** vLLM's limit on a body is 32 MiB, and base64 takes 4 bytes for 3. */
const MAX_BYTES = 20 << 20;

export interface Taken {
  images: string[];
  /** One line for each file that is no picture for us. */
  refused: string[];
}

export async function take(files: Iterable<File>): Promise<Taken> {
  const taken: Taken = { images: [], refused: [] };
  for (const file of files) {
    if (!PICTURE_TYPES.includes(file.type)) {
      taken.refused.push(`${file.name}: only PNG, JPEG, WebP, GIF and BMP pictures can be sent`);
    } else if (file.size > MAX_BYTES) {
      taken.refused.push(
        `${file.name}: ${(file.size / (1 << 20)).toFixed(1)} MiB; the limit is ${MAX_BYTES >> 20} MiB`,
      );
    } else {
      taken.images.push(await dataUrl(file));
    }
  }
  return taken;
}

function dataUrl(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error ?? new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}
