"use strict";

// Drawing attention over a photo. One byte per location comes in, of one word; its brightest location has 255.

const redraws = new WeakMap(); // a canvas -> what draws it again, when the reader asks for another look

const FULL_LIGHT = 4; // times the mean: as in attention_figures.py, even attention looks even

/** Draw a photo, lit where one word's attention is. */
function draw(canvas, image, attention, index) {
  const paint = () => {
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const style = document.getElementById("look").value;
    const light = stretch(weightsOf(attention, index), attention.side, width, height, style !== "squares");
    const peak = attention.peaks[index] * attention.side ** 2; // in multiples of the mean
    const scale = Math.min(1, peak / FULL_LIGHT);
    for (let i = 0; i < light.length; i++) light[i] *= scale;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const picture = context.getImageData(0, 0, width, height);
    (style === "heat" ? heat : spotlight)(picture.data, light);
    context.putImageData(picture, 0, 0);
  };
  redraws.set(canvas, paint);
  if (image.complete) paint();
  else image.addEventListener("load", paint, { once: true });
}

function weightsOf(attention, index) {
  const bytes = atob(attention.weights);
  const size = attention.side ** 2;
  return Uint8Array.from({ length: size }, (_, i) => bytes.charCodeAt(index * size + i));
}

/** Stretch a grid over width x height pixels: smoothly by cubic B-splines, or location by location. 0 to 1, its maximum 1. */
function stretch(grid, side, width, height, smooth) {
  const across = weigh(side, width, smooth);
  const down = weigh(side, height, smooth);
  const rows = new Float32Array(side * width);
  for (let r = 0; r < side; r++) {
    for (let x = 0; x < width; x++) {
      for (let k = 4 * x; k < 4 * x + 4; k++) rows[r * width + x] += across.weights[k] * grid[r * side + across.locations[k]];
    }
  }
  const light = new Float32Array(width * height);
  let highest = 1e-9;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let k = 4 * y; k < 4 * y + 4; k++) sum += down.weights[k] * rows[down.locations[k] * width + x];
      light[y * width + x] = sum;
      highest = Math.max(highest, sum);
    }
  }
  return light.map((number) => number / highest);
}

/** Which four locations of a row of `side` a pixel of `length` mixes, and how much of each. */
function weigh(side, length, smooth) {
  const locations = new Int32Array(4 * length);
  const weights = new Float32Array(4 * length);
  for (let x = 0; x < length; x++) {
    const place = ((x + 0.5) * side) / length - 0.5;
    const first = smooth ? Math.floor(place) : Math.floor((x * side) / length);
    const t = place - Math.floor(place);
    const spline = [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3];
    for (let k = 0; k < 4; k++) {
      locations[4 * x + k] = Math.min(side - 1, Math.max(0, first - 1 + k));
      weights[4 * x + k] = smooth ? spline[k] / 6 : Number(k === 1);
    }
  }
  return { locations, weights };
}

function spotlight(pixels, light) { // as figures.py does: dim and grey where nothing is looked at
  for (let i = 0; i < light.length; i++) {
    const p = 4 * i;
    const dim = (1 - light[i]) * 0.1 * (pixels[p] + pixels[p + 1] + pixels[p + 2]);
    for (let c = p; c < p + 3; c++) pixels[c] = light[i] * pixels[c] + dim;
  }
}

function heat(pixels, light) { // for dark photos: grey, under red, then orange, then yellow
  for (let i = 0; i < light.length; i++) {
    const p = 4 * i;
    const grey = (pixels[p] + pixels[p + 1] + pixels[p + 2]) / 3;
    const cover = 0.75 * Math.sqrt(light[i]);
    const colour = [190 + 65 * light[i], 30 + 200 * light[i], 20 + 40 * light[i]];
    for (let c = 0; c < 3; c++) pixels[p + c] = (1 - cover) * grey + cover * colour[c];
  }
}
