// Builds the scripts and style sheets of all pages into webui/static/viewer, with the licences of what is inside.
import fs from "node:fs";
import path from "node:path";
import zlib from "node:zlib";
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const here = path.dirname(fileURLToPath(import.meta.url));
const shim = (name) => path.join(here, "src", "shims", `${name}.ts`);

/**
 * Leaves out what the study page never runs. Cornerstone's entry point reaches every kind of viewport (volume, video,
 * ECG, whole slide) and, through its metadata package, a complete DICOM parser and an XML library: two thirds of the
 * JavaScript, which an old PC would have to load and compile before the first picture appears. The box decodes DICOM,
 * so only the stack viewport and the narrow part of the metadata package are used.
 */
function leaveOutUnused() {
  const replaced = [
    [/^@cornerstonejs\/metadata$/, shim("metadata")],
    [/^dcmjs$/, shim("dcmjs")],
    [/\/viewportTypeToViewportClass\.js$/, shim("viewportTypes")],
    [/\/WebGPU\/Profiles\/\w+\.js$/, shim("nothing")],
  ];
  return {
    name: "leave-out-unused",
    enforce: "pre",
    resolveId(source) {
      return replaced.find(([pattern]) => pattern.test(source))?.[1] ?? null;
    },
  };
}

/** Writes the compressed form beside each file: an old PC on a slow network loads a third of the bytes, and the box compresses nothing. */
function compress() {
  return {
    name: "compress",
    writeBundle({ dir }, bundle) {
      for (const name of Object.keys(bundle)) {
        const data = fs.readFileSync(path.join(dir, name));
        if (/\.(js|css)$/.test(name) && data.length > 1024) {
          fs.writeFileSync(path.join(dir, `${name}.gz`), zlib.gzipSync(data, { level: 9 }));
        }
      }
    },
  };
}

export default defineConfig({
  root: here,
  base: "./",
  plugins: [leaveOutUnused(), compress()],
  // Parts of vtk.js import these two Node built-ins by name; without the npm packages of the same name the build
  // succeeds and the page dies at load, because Vite puts empty modules in their place.
  resolve: { alias: { events: "events/", url: "url/" } },
  // Cornerstone's workers are ES modules; Vite's default format (iife) cannot hold their dynamic imports.
  worker: { format: "es" },
  build: {
    outDir: path.join(here, "..", "static", "viewer"),
    emptyOutDir: true,
    target: "es2021",
    sourcemap: false,
    // Style sheets stay as they are written: the minifier would rewrite the font stack and selectors for browsers that
    // cannot run the scripts anyway.
    cssMinify: false,
    chunkSizeWarningLimit: 1600,
    // The polyfill would add a script of its own for browsers that cannot run the bundle anyway.
    modulePreload: { polyfill: false },
    license: { fileName: "LICENSES.md" },
    rollupOptions: {
      input: {
        ...Object.fromEntries(["page", "worklist", "study", "health"].map((name) => [name, path.join(here, "src", "pages", `${name}.ts`)])),
        viewer: path.join(here, "src", "main.ts"),
        upload: path.join(here, "src", "upload.ts"),
        // Pages without a script of their own.
        login: path.join(here, "src", "styles", "login.css"),
        rejected: path.join(here, "src", "styles", "rejected.css"),
      },
      // Stable names: the templates ask for page.js, page.css and so on and add ?v= themselves. What the scripts share
      // has its digest in its name, since nobody adds anything to that address.
      output: {
        entryFileNames: "[name].js",
        chunkFileNames: "part-[hash].js",
        assetFileNames: "[name][extname]",
        codeSplitting: { groups: [{ name: "part", test: /[\\/]src[\\/]/, minShareCount: 2 }] },
      },
    },
  },
});
