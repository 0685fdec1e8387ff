// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";

/// @title Models by content
/// @notice Anyone registers any model. Its id is derived from the weights and the prompt template, so it can never come to mean
/// something else. The list owner may flag a model; a flag is advice to readers and binds no contract.
contract ModelRegistry is Ownable2Step {
    uint256 public constant MAX_URI_BYTES = 512;
    uint256 public constant MAX_NAME_BYTES = 128;

    /// @param fileHash Hash of the weights file.
    /// @param templateHash Hash of the prompt template; zero if the file carries it.
    /// @param registeredBy Who registered it first; it gives no rights.
    /// @param flagged Whether the list owner advises against it.
    struct Model {
        bytes32 fileHash;
        bytes32 templateHash;
        address registeredBy;
        bool flagged;
    }

    mapping(bytes32 modelId => Model) private _models;

    event ModelRegistered(
        bytes32 indexed modelId, bytes32 indexed fileHash, bytes32 templateHash, address indexed by, string uri, string name
    );
    event ModelFlagged(bytes32 indexed modelId, bool flagged, string reason);

    error ZeroFileHash();
    error ModelExists(bytes32 modelId);
    error UnknownModel(bytes32 modelId);
    error StringTooLong(uint256 bytes_, uint256 max);

    constructor(address listOwner) Ownable(listOwner) {}

    /// @notice Publishes a model under its content-derived id. Called by anyone, once per id.
    /// @param uri Where the file may be found; a hint, the hash decides.
    /// @param name What people call it; a hint too.
    function registerModel(bytes32 fileHash, bytes32 templateHash, string calldata uri, string calldata name)
        external
        returns (bytes32 modelId)
    {
        if (fileHash == bytes32(0)) revert ZeroFileHash();
        if (bytes(uri).length > MAX_URI_BYTES) revert StringTooLong(bytes(uri).length, MAX_URI_BYTES);
        if (bytes(name).length > MAX_NAME_BYTES) revert StringTooLong(bytes(name).length, MAX_NAME_BYTES);
        modelId = keccak256(abi.encode(fileHash, templateHash));
        if (_models[modelId].registeredBy != address(0)) revert ModelExists(modelId);
        _models[modelId] = Model(fileHash, templateHash, msg.sender, false);
        emit ModelRegistered(modelId, fileHash, templateHash, msg.sender, uri, name);
    }

    /// @notice Advises against a model. Called by the list owner.
    function flag(bytes32 modelId, string calldata reason) external onlyOwner {
        _setFlag(modelId, true, reason);
    }

    /// @notice Takes the advice back. Called by the list owner.
    function unflag(bytes32 modelId, string calldata reason) external onlyOwner {
        _setFlag(modelId, false, reason);
    }

    /// @notice What is stored about a model; all zero when the id is not registered.
    function model(bytes32 modelId) external view returns (Model memory) {
        return _models[modelId];
    }

    function _setFlag(bytes32 modelId, bool flagged, string calldata reason) private {
        if (_models[modelId].registeredBy == address(0)) revert UnknownModel(modelId);
        if (bytes(reason).length > MAX_URI_BYTES) revert StringTooLong(bytes(reason).length, MAX_URI_BYTES);
        _models[modelId].flagged = flagged;
        emit ModelFlagged(modelId, flagged, reason);
    }
}
