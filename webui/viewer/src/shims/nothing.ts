/** An empty module: vtk.js registers its WebGPU renderer through imports, and Cornerstone draws with WebGL only. */
export {};
