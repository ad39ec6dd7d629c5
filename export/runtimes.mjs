// Runs one graph in onnxruntime for Node.js or for browsers: node runtimes.mjs PACKAGE GRAPH GIVEN FOUND, as runtimes.py does.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join } from 'node:path';

const [folder, graph, given, found] = process.argv.slice(2);
const ort = createRequire(join(folder, 'package.json'))(folder);
const KINDS = {
  float32: Float32Array, float64: Float64Array, int32: Int32Array, int64: BigInt64Array, uint8: Uint8Array, int8: Int8Array, bool: Uint8Array,
};

const feeds = {};
for (const { name, dtype, shape, file } of JSON.parse(readFileSync(join(given, 'about.json')))) {
  const bytes = readFileSync(join(given, file));
  const data = new KINDS[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  feeds[name] = new ort.Tensor(dtype, data, shape);
}
let session;
if (basename(folder) === 'onnxruntime-web') { // which opens no files
  const weights = 'weights.safetensors';
  const external = [{ path: weights, data: new Uint8Array(readFileSync(join(dirname(graph), weights))) }];
  ort.env.wasm.numThreads = 1;
  session = await ort.InferenceSession.create(new Uint8Array(readFileSync(graph)), { externalData: external });
} else {
  session = await ort.InferenceSession.create(graph);
}
const outputs = await session.run(feeds);
mkdirSync(found, { recursive: true });
const about = session.outputNames.map((name, number) => {
  const { type, dims, data } = outputs[name];
  writeFileSync(join(found, `${number}.bin`), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return { name, dtype: type, shape: dims, file: `${number}.bin` };
});
writeFileSync(join(found, 'about.json'), JSON.stringify(about));
