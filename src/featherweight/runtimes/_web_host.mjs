// Opens ONNX files with onnxruntime-web and runs them, asked over standard input, answering on standard output.
//
// A frame is the length of a JSON header (4 bytes, little-endian), the header, and the raw bytes of the
// tensors that it describes under "tensors". Reading waits without the event loop, so that a call costs two
// writes and two reads. What ONNX Runtime prints goes to standard error, a profile into its answer.
//
//   node _web_host.mjs DIST THREADS     DIST: the package's folder of that name, in which the WebAssembly is
import fs from 'node:fs';
import { pathToFileURL } from 'node:url';

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: globalThis.Float16Array ?? Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
};
// ONNX opset 13: y = Identity(x), float[1]. Opening it brings the WebAssembly up before anything is asked.
const IDENTITY = 'CAc6NwoQCgF4EgF5IghJZGVudGl0eRIBaVoPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=';

// WebAssembly that prints calls this very function; standard output belongs to the frames.
const printed = [];
const write = fs.writeSync;
fs.writeSync = (file, text, ...rest) => (file === 1 ? printed.push(text) : write(file, text, ...rest));

const dist = pathToFileURL(`${process.argv[2]}/`).href;
const ort = await import(`${dist}ort.node.min.mjs`);
ort.env.wasm.wasmPaths = dist;
ort.env.wasm.numThreads = Number(process.argv[3]);
ort.env.logLevel = 'error';
const sessions = [];

function receive(bytes) {
  for (let filled = 0; filled < bytes.length; ) {
    const count = fs.readSync(0, bytes, filled, bytes.length - filled);
    if (count === 0) process.exit(0); // nobody asks any more
    filled += count;
  }
  return bytes;
}

function send(header, arrays = []) {
  const head = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(4);
  size.writeUInt32LE(head.length);
  const bytes = arrays.map((array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength));
  const small = bytes.reduce((sum, one) => sum + one.length, 0) < 65536;
  for (const part of small ? [Buffer.concat([size, head, ...bytes])] : [size, head, ...bytes]) {
    for (let done = 0; done < part.length; ) done += write(1, part, done);
  }
}

function tensor({ dtype, shape }, index, kept) {
  const length = shape.reduce((product, one) => product * one, 1);
  if (!(kept[index] instanceof ARRAYS[dtype]) || kept[index].length !== length) {
    kept[index] = new ARRAYS[dtype](length); // the next call of the same shape takes it again
  }
  receive(new Uint8Array(kept[index].buffer));
  return new ort.Tensor(dtype, kept[index], shape);
}

const create = (bytes, options) =>
  ort.InferenceSession.create(bytes, { executionProviders: ['wasm'], ...options });

function feeds({ inputNames }, inputs) {
  if (inputs.length !== inputNames.length) {
    throw new Error(`the model has ${inputNames.length} inputs, and ${inputs.length} were given`);
  }
  return Object.fromEntries(inputNames.map((name, index) => [name, inputs[index]]));
}

async function run(session, inputs) {
  const results = await session.run(feeds(session, inputs));
  const outputs = session.outputNames.map((name) => results[name]);
  const tensors = outputs.map(({ type, dims }) => ({ dtype: type, shape: dims }));
  send({ tensors }, outputs.map(({ data }) => data));
}

async function profile({ file, options, calls }, inputs) {
  const session = await create(fs.readFileSync(file), { ...options, enableProfiling: true });
  for (let call = 0; call < calls; call++) await session.run(feeds(session, inputs));
  printed.length = 0;
  session.endProfiling();
  await session.release();
  send({ events: JSON.parse(printed.splice(0).join('')) });
}

async function answer(header, inputs) {
  if (header.do === 'run') await run(sessions[header.session], inputs);
  else if (header.do === 'profile') await profile(header, inputs);
  else send({ session: sessions.push(await create(fs.readFileSync(header.file), header.options)) - 1 });
}

await create(Buffer.from(IDENTITY, 'base64')).then(
  () => send({ node: process.versions.node }),
  (error) => send({ error: error.message }),
);
const kept = [];
for (;;) {
  const size = Buffer.from(receive(new Uint8Array(4))).readUInt32LE();
  const header = JSON.parse(Buffer.from(receive(new Uint8Array(size))).toString());
  const inputs = header.tensors.map((described, index) => tensor(described, index, kept));
  await answer(header, inputs).catch((error) => send({ error: error?.message ?? String(error) }));
  for (const text of printed.splice(0)) write(2, text);
}
