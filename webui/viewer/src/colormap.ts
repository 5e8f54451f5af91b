/**
 * The colours of the heat map: dark violet over red and orange to pale yellow.
 *
 * Lightness rises evenly in OKLCH, so equal steps of the value look like equal steps, also to a colour-blind person and in
 * a black-and-white print. Low values are transparent: the lung beneath must stay readable.
 */

const STEPS = 256;

/** One OKLCH colour as linear sRGB (Björn Ottosson's OKLab matrices). */
function oklchToLinear(lightness: number, chroma: number, hue: number): [number, number, number] {
  const a = chroma * Math.cos(hue);
  const b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

function toByte(linear: number): number {
  const encoded = linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055;
  return Math.round(255 * Math.min(1, Math.max(0, encoded)));
}

/** The most colourful sRGB colour of this lightness and hue, up to the wanted chroma. */
function inGamut(lightness: number, chroma: number, hue: number): [number, number, number] {
  for (let c = chroma; c > 0; c -= 0.005) {
    const rgb = oklchToLinear(lightness, c, hue);
    if (rgb.every((channel) => channel >= 0 && channel <= 1)) {
      return rgb;
    }
  }
  return oklchToLinear(lightness, 0, hue);
}

function smoothstep(low: number, high: number, value: number): number {
  const t = Math.min(1, Math.max(0, (value - low) / (high - low)));
  return t * t * (3 - 2 * t);
}

function build(): Uint8ClampedArray {
  const table = new Uint8ClampedArray(STEPS * 4);
  for (let i = 0; i < STEPS; i++) {
    const t = i / (STEPS - 1);
    const hue = ((300 + 168 * t) * Math.PI) / 180;
    const [r, g, b] = inGamut(0.32 + 0.62 * t, 0.24, hue);
    table.set([toByte(r), toByte(g), toByte(b), Math.round(255 * smoothstep(0.06, 0.5, t))], i * 4);
  }
  return table;
}

let table: Uint8ClampedArray | undefined;

/** RGBA of the 256 values, computed once. */
export function colourTable(): Uint8ClampedArray {
  return (table ??= build());
}

/** A canvas with the heat map's values (red channel) in colours. */
export function colourise(values: ImageData): HTMLCanvasElement {
  const colours = colourTable();
  const canvas = document.createElement("canvas");
  canvas.width = values.width;
  canvas.height = values.height;
  const context = canvas.getContext("2d");
  const out = new ImageData(values.width, values.height);
  for (let i = 0; i < values.data.length; i += 4) {
    const at = (values.data[i] as number) * 4;
    out.data.set(colours.subarray(at, at + 4), i);
  }
  context?.putImageData(out, 0, 0);
  return canvas;
}
